"""What the tests of streams share: a loading that leaves pixels as they are, and small training streams."""

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
    """A training stream as the trainer makes it; ``options`` are its seed, ranks, device and dtype."""
    where = {name: options.pop(name) for name in ("device", "dtype") if name in options}
    return TrainStream(manifest, data, augment, loading=Loading.of(data, **PLAIN, **where), **{"seed": 5, **options})


def small_stream(manifest: Manifest, loader="dali", **changes) -> TrainStream:
    """Batches of eight; ``changes`` go into the data's configuration."""
    return stream_of(manifest, DataConfig(**{"batch_size": 8, "loader": loader, "threads": 1, **changes}))


def smooth_picture(generator, width, height):
    """A smooth random picture: resampling differences between libraries stay small on it."""
    coarse = generator.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def assert_ranks_make_the_batches(whole, ranks):
    """What the ranks' streams yield, put together, is what one stream yields, bit for bit."""
    for step, batch in enumerate(whole):
        for name in ("query", "key", "index", "is_source"):
            assert torch.equal(torch.cat([getattr(rank[step], name) for rank in ranks]), getattr(batch, name))
