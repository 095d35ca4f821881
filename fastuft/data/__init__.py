"""From image files to normalized views: manifest, order, random numbers, decoding backends, streams."""

from fastuft.data.bad import BadFile, BadImageError, write_bad_list
from fastuft.data.decoding import image_size, open_rgb, verify_files
from fastuft.data.duplicates import Duplicates, find_duplicates
from fastuft.data.evaluation import EvalStream
from fastuft.data.images import labels_of_images, size_and_version
from fastuft.data.labeled import LabeledTrainStream
from fastuft.data.left_out import IMAGE_SUFFIXES
from fastuft.data.listing import labeled_folder, list_images
from fastuft.data.loading import Loader, Loading, processors, resolve_loader
from fastuft.data.manifest import Manifest
from fastuft.data.reading import read_bytes
from fastuft.data.sources import listings_agreed
from fastuft.data.strong import StrongConfig
from fastuft.data.training import Batch, TrainStream
from fastuft.data.views import CROP_DRAWS, SMALL_IMAGES, crop_regions
from fastuft.data.weak_strong import WeakStrongStream

__all__ = [
    "CROP_DRAWS",
    "IMAGE_SUFFIXES",
    "SMALL_IMAGES",
    "BadFile",
    "BadImageError",
    "Batch",
    "Duplicates",
    "EvalStream",
    "LabeledTrainStream",
    "Loader",
    "Loading",
    "Manifest",
    "StrongConfig",
    "TrainStream",
    "WeakStrongStream",
    "crop_regions",
    "find_duplicates",
    "image_size",
    "labeled_folder",
    "labels_of_images",
    "list_images",
    "listings_agreed",
    "open_rgb",
    "processors",
    "read_bytes",
    "resolve_loader",
    "size_and_version",
    "verify_files",
    "write_bad_list",
]
