"""Images from files to normalized views: manifest, order, random numbers, decoding backends, streams."""

from fastuft.data.backend import processors
from fastuft.data.feed import resolve_loader
from fastuft.data.files import (
    BadFile,
    BadImageError,
    image_size,
    labeled_folder,
    list_images,
    verify_files,
    write_bad_list,
)
from fastuft.data.manifest import Manifest
from fastuft.data.streams import Batch, EvalStream, LabeledTrainStream, TrainStream, WeakStrongStream
from fastuft.data.strong import StrongConfig
from fastuft.data.views import SMALL_IMAGES

__all__ = [
    "SMALL_IMAGES",
    "BadFile",
    "BadImageError",
    "Batch",
    "EvalStream",
    "LabeledTrainStream",
    "Manifest",
    "StrongConfig",
    "TrainStream",
    "WeakStrongStream",
    "image_size",
    "labeled_folder",
    "list_images",
    "processors",
    "resolve_loader",
    "verify_files",
    "write_bad_list",
]
