"""Small sets of images shared by the tests of streams."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from stream_cases import smooth_picture

from fastuft.data import Manifest


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("order")
    generator = np.random.default_rng(0)
    for name, count in (("target", 20), ("source", 30)):
        (root / name).mkdir()
        for index in range(count):
            coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((40, 36), Image.Resampling.BICUBIC).save(root / name / f"{index:02d}.png")
    return Manifest.build(str(root / "target"), str(root / "source"), fraction=0.5)


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory):
    """JPEGs, which a GPU can decode."""
    root = tmp_path_factory.mktemp("jpegs")
    generator = np.random.default_rng(1)
    for index in range(32):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((320 + index, 240), Image.Resampling.BICUBIC).save(root / f"{index:02d}.jpg", quality=90)
    return Manifest.build(str(root))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, count in (("target", 41), ("source", 90)):
        for index in range(count):
            suffix = ("jpg", "png", "webp", "bmp")[index % 4]
            path = root / name / f"class{index % 3}" / f"{index:03d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            smooth_picture(generator, 40 + index % 7, 50 - index % 5).save(path)
    return str(root / "target"), str(root / "source")
