"""Helpers of the stream tests: loading without normalization, and small training streams."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from fastuft.config import AugmentConfig, DataConfig
from fastuft.data import SMALL_IMAGES, Loading, Manifest, TrainStream

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
LOADERS = ["dali", "torch"]


def plain(loader="auto", **changes) -> Loading:
    """Pixels in [0, 1]."""
    return Loading(**PLAIN, loader=loader, **changes)


def stream_of(manifest: Manifest, data: DataConfig, augment: AugmentConfig = SMALL_IMAGES, **options) -> TrainStream:
    """A training stream as the trainer builds it; ``options`` are its seed, ranks, device and dtype."""
    where = {name: options.pop(name) for name in ("device", "dtype") if name in options}
    return TrainStream(manifest, data, augment, loading=Loading.of(data, **PLAIN, **where), **{"seed": 5, **options})


def small_stream(manifest: Manifest, loader="dali", **changes) -> TrainStream:
    """A stream of batches of eight; ``changes`` apply to the data configuration."""
    return stream_of(manifest, DataConfig(**{"batch_size": 8, "loader": loader, "threads": 1, **changes}))


def smooth_picture(generator, width, height):
    """A smooth random picture, on which libraries differ little in resampling."""
    coarse = generator.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def assert_ranks_make_the_batches(whole, ranks):
    """The concatenated batches of all ranks equal those of a single stream bitwise."""
    for step, batch in enumerate(whole):
        for name in ("query", "key", "index", "is_source"):
            assert torch.equal(torch.cat([getattr(rank[step], name) for rank in ranks]), getattr(batch, name))
