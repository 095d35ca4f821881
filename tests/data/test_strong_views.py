"""RandAugment and Cutout: every operator does what its name says, equally in both loaders, from the drawn numbers only."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from stream_cases import LOADERS, plain

from fastuft.config import AugmentConfig
from fastuft.data import BadImageError, StrongConfig, WeakStrongStream
from fastuft.data.strong import BINS, FILL, RANGES, draw_strong, draws_of, magnitude

WHOLE = AugmentConfig(
    size=32, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), jitter_p=0, grayscale_p=0, blur_p=0, flip_p=0
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Twelve smooth color pictures of 32 pixels."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    files = []
    for index in range(12):
        coarse = generator.integers(20, 230, (4, 4, 3)).astype(np.uint8)
        picture = Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)
        files.append(str(root / f"{index}.png"))
        picture.save(files[-1])
    return files


def views(paths, loader, strong, augment=WHOLE, epoch=0, batch=5, threads=2, seed=3):
    """(weak, strong) in gray levels, [n, 3, 32, 32] each."""
    stream = WeakStrongStream(
        paths, augment=augment, strong=strong, batch_size=batch, seed=seed, loading=plain(loader, threads=threads)
    )
    pairs = list(stream.epoch(epoch))
    assert len(pairs) == len(stream)
    stream.close()
    return tuple(255 * torch.cat(part) for part in zip(*pairs, strict=True))


@pytest.mark.parametrize("name", RANGES)
def test_loaders_agree_on_each_operator(paths, name):
    config = StrongConfig(ops=(name,), num_ops=1, cutout=0.0)
    dali, pillow = (views(paths, loader, config)[1] for loader in LOADERS)
    inside = (..., slice(1, -1), slice(1, -1))  # Pillow does not sharpen the border
    difference = (dali[inside] - pillow[inside]).abs()
    # Histogram equalization follows OpenCV in DALI and Pillow's own table there; borders of moved images blend otherwise.
    bound = {"equalize": 6.0, "rotate": 3.0, "shear_x": 3.0, "shear_y": 3.0, "translate_x": 6.0, "translate_y": 6.0}
    assert difference.mean() < bound.get(name, 1.0), difference.mean()
    weak = views(paths, "torch", config)[0]
    changed = (pillow - weak).abs().mean()
    assert changed == 0 if name == "identity" else changed > 0.1  # smooth pictures change least when sharpened


def test_cutout_erases_one_square_of_the_given_size(paths):
    config = StrongConfig(ops=("identity",), num_ops=1, cutout=0.5)
    for loader in LOADERS:
        weak, strong = views(paths, loader, config)
        erased = (strong == FILL).all(1)
        assert ((strong == weak) | erased[:, None]).all()
        areas = erased.flatten(1).sum(1)
        assert areas.max() <= 256 and areas.min() >= 64  # a clipped square keeps a quarter at least


def test_views_do_not_depend_on_batches_threads_or_loader_order(paths):
    augment = dataclasses.replace(WHOLE, crop_scale=(0.5, 1.0), flip_p=0.5)
    for loader in LOADERS:
        first = views(paths, loader, StrongConfig(), augment)
        again = views(paths, loader, StrongConfig(), augment, batch=12, threads=1)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)
        other = views(paths, loader, StrongConfig(), augment, epoch=1)
        assert not torch.equal(first[1], other[1])


def test_draws_cover_operators_magnitudes_signs_and_positions():
    config = StrongConfig()
    drawn = draw_strong(config, 32, np.random.default_rng(0).random((20000, draws_of(config))))
    share = np.bincount(drawn.op.ravel(), minlength=len(config.ops)) / drawn.op.size
    np.testing.assert_allclose(share, 1 / 14, atol=0.005)
    assert np.unique(drawn.magnitude_bin).tolist() == list(range(BINS))
    assert abs(drawn.negate.mean() - 0.5) < 0.01
    assert drawn.erase_start.min() == 0 and (drawn.erase_start + drawn.erase_shape).max() == 32
    assert drawn.erase_shape.max() == 16 and drawn.erase_shape.min() == 8


def test_magnitudes_span_their_ranges():
    assert magnitude("rotate", BINS - 1, 1) == -30 and magnitude("rotate", BINS - 1, 0) == 30
    assert magnitude("brightness", 0, 1) == -0.05 and magnitude("brightness", BINS - 1, 1) == -0.95
    assert (magnitude("posterize", 0, 0), magnitude("posterize", BINS - 1, 0)) == (8, 4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StrongConfig(ops=()), "ops is empty"),
        (lambda: StrongConfig(ops=("warp",)), "ops='warp'.*auto_contrast"),
        (lambda: StrongConfig(cutout=2), r"cutout=2.*\[0, 1\]"),
        (lambda: StrongConfig(num_ops=-1), "num_ops=-1"),
        (
            lambda: WeakStrongStream(
                ["x"], augment=AugmentConfig(), strong=StrongConfig(), batch_size=2, seed=0, loading=plain()
            ),
            "jitter_p, grayscale_p and blur_p must be 0",
        ),
        (
            lambda: WeakStrongStream([], augment=WHOLE, strong=StrongConfig(), batch_size=2, seed=0, loading=plain()),
            "paths is empty",
        ),
    ],
)
def test_wrong_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_bad_file_is_named(paths, tmp_path, loader):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    with pytest.raises(BadImageError, match=r"bad\.png"):
        views([*paths, str(bad)], loader, StrongConfig())
