"""CutMix and MixUp on a CPU: values against the plain reference, over shapes, layouts, dtypes, boxes and partners."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mix_cases import DTYPES, ORDERS, fill

import fastuft
from fastuft.mix import ops, reference

RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_the_extension_is_built_here():
    """The suite must not silently pass on the reference alone."""
    if not ops.HAS_CPU_EXTENSION:
        pytest.skip("the compiled extension _C is not built on this machine")


@st.composite
def batches(draw, in_place=False):
    """(images, boxes, partner, lam) of any small shape, layout and dtype."""
    shape = [draw(st.integers(1, 7)), *(draw(st.integers(1, 9)) for _ in range(3))]
    images = fill(shape, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(ORDERS)), draw(st.integers(0, 99)))
    rows = shape[0] // 2 if in_place else shape[0]
    boxes = []
    for _ in range(rows):
        top, bottom = sorted(draw(st.integers(0, shape[2])) for _ in range(2))
        left, right = sorted(draw(st.integers(0, shape[3])) for _ in range(2))
        boxes.append([top, left, bottom, right])
    partner = [draw(st.integers(0, shape[0] - 1)) for _ in range(shape[0])]
    lam = [draw(st.floats(0, 1, width=32)) for _ in range(rows)]
    return (
        images,
        torch.tensor(boxes, dtype=torch.int32).reshape(rows, 4),
        torch.tensor(partner),
        torch.tensor(lam, dtype=torch.float32),
    )


@RELAXED
@given(batches())
def test_cutmix_equals_the_reference_bitwise(batch):
    images, boxes, partner, _ = batch
    before = images.clone()
    mixed = fastuft.cutmix(images, boxes, partner)
    assert torch.equal(mixed, reference.cutmix(images, boxes, partner))
    assert torch.equal(images, before) and mixed.dtype == images.dtype
    assert mixed.data_ptr() != images.data_ptr()


@RELAXED
@given(batches(in_place=True))
def test_cutmix_in_place_equals_the_reference_bitwise(batch):
    images, boxes, _, _ = batch
    expected = images.clone()
    reference.cutmix_(expected, boxes)
    assert fastuft.cutmix_(images, boxes) is images
    assert torch.equal(images, expected)


@RELAXED
@given(batches())
def test_mixup_rounds_once(batch):
    images, _, partner, lam = batch
    mixed = fastuft.mixup(images, lam, partner)
    assert mixed.dtype == images.dtype
    torch.testing.assert_close(mixed, reference.mixup(images, lam, partner), rtol=0, atol=0)


@RELAXED
@given(batches(in_place=True))
def test_mixup_in_place_rounds_once(batch):
    images, _, _, lam = batch
    expected = images.clone()
    reference.mixup_(expected, lam)
    fastuft.mixup_(images, lam)
    torch.testing.assert_close(images, expected, rtol=0, atol=0)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def test_grouped_pairs_equal_separate_calls_per_group(group, form):
    images = torch.rand(12, 3, 9, 7).contiguous(memory_format=form)
    pairs = 12 // group * (group // 2)
    boxes, lam = fastuft.sample_boxes(pairs, 9, 7, generator=torch.Generator().manual_seed(group))
    mixed, expected, plain = images.clone(), images.clone(), images.clone()
    for part, own in zip(expected.split(group), boxes.split(group // 2) if pairs else [boxes] * 12, strict=True):
        fastuft.cutmix_(part, own)
    fastuft.cutmix_(mixed, boxes, group)
    reference.cutmix_(plain, boxes, group)
    assert torch.equal(mixed, expected) and torch.equal(plain, expected)
    for part, own in zip(expected.split(group), lam.split(group // 2) if pairs else [lam] * 12, strict=True):
        fastuft.mixup_(part, own)
    fastuft.mixup_(mixed, lam, group)
    reference.mixup_(plain, lam, group)
    assert torch.equal(mixed, expected) and torch.equal(plain, expected)


def brute_force_cutmix(images, boxes, partner):
    """CutMix pixel by pixel, as defined."""
    mixed = images.clone()
    for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
        for y, x in itertools.product(range(top, bottom), range(left, right)):
            mixed[i, :, y, x] = images[partner[i], :, y, x]
    return mixed


def test_the_reference_equals_the_definition():
    images = fill([5, 3, 6, 7], torch.float32, (0, 1, 2, 3), 0)
    boxes, lam = fastuft.sample_boxes(5, 6, 7, generator=torch.Generator().manual_seed(1))
    partner = torch.tensor([4, 4, 0, 3, 1])
    mixed = brute_force_cutmix(images, boxes, partner)
    assert torch.equal(reference.cutmix(images, boxes, partner), mixed)
    kept = (mixed == images).all(1).flatten(1).float().mean(1)
    assert (kept >= lam - 1e-6).all()  # equal pixels by chance aside, lam is the share that remains


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_odd_batches_keep_the_middle_sample(batch):
    images = fill([batch, 2, 4, 4], torch.float32, (0, 2, 3, 1), 0)
    before = images.clone()
    whole = torch.tensor([[0, 0, 4, 4]] * (batch // 2), dtype=torch.int32).reshape(-1, 4)
    fastuft.cutmix_(images, whole)
    assert torch.equal(images, before.flip(0))


def test_non_dense_views_are_supported():
    base = fill([6, 3, 8, 20], torch.float32, (0, 1, 2, 3), 0)
    for view in (base[:, :, :, ::2], base[:, :, 1:7, 3:11], base[::2]):
        boxes, _ = fastuft.sample_boxes(len(view) // 2, *view.shape[2:], generator=torch.Generator().manual_seed(2))
        everywhere, _ = fastuft.sample_boxes(len(view), *view.shape[2:], generator=torch.Generator().manual_seed(2))
        partner = torch.arange(len(view)).flip(0)
        assert torch.equal(fastuft.cutmix(view, everywhere, partner), reference.cutmix(view, everywhere, partner))
        changed, untouched = base.clone(), base.clone()
        inner = changed.as_strided(view.shape, view.stride(), view.storage_offset())
        expected = view.clone()
        reference.cutmix_(expected, boxes)
        fastuft.cutmix_(inner, boxes)
        assert torch.equal(inner, expected)
        inner.copy_(view)
        assert torch.equal(changed, untouched), "a pixel outside the view was written"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3)], ids=str)
def test_outputs_larger_than_the_cache_are_exact(order):
    """Such outputs are written with streaming stores, here at odd offsets; the sizes exceed any last-level cache."""
    side = 1501
    images = fill([6, 3, side, side], torch.float32, order, 0)
    boxes, lam = fastuft.sample_boxes(6, side, side, generator=torch.Generator().manual_seed(0))
    partner = torch.tensor([5, 4, 3, 3, 1, 0])
    assert torch.equal(fastuft.cutmix(images, boxes, partner), reference.cutmix(images, boxes, partner))
    assert torch.equal(fastuft.mixup(images, lam, partner), reference.mixup(images, lam, partner))


def test_without_the_extension_the_reference_is_used(tmp_path):
    """A copy of the package without libraries warns once, says how to build them, and gives equal results."""
    import shutil
    import subprocess
    import sys
    from pathlib import Path

    root = Path(fastuft.__file__).parent
    shutil.copytree(root, tmp_path / "fastuft", ignore=shutil.ignore_patterns("*.so", "__pycache__"), symlinks=False)
    script = (
        "import warnings, torch, fastuft\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    x = torch.rand(4, 3, 4, 4); b = torch.tensor([[0, 0, 2, 2]] * 4, dtype=torch.int32)\n"
        "    y = fastuft.cutmix(x, b, torch.tensor([1, 0, 3, 2]))\n"
        "    fastuft.cutmix_(x, b[:2])\n"
        "texts = [str(w.message) for w in seen if 'extension' in str(w.message)]\n"
        "assert len(texts) == 1 and 'pip install' in texts[0], texts\n"
        "z = torch.rand(4, 3, 4, 4); z[:] = torch.arange(4.)[:, None, None, None]\n"
        "y = fastuft.cutmix(z, b, torch.tensor([1, 0, 3, 2]))\n"
        "assert (y[0, :, :2, :2] == 1).all() and (y[0, :, 2:] == 0).all() and (y[0, :, :2, 2:] == 0).all()\n"
        "print('ok', fastuft.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr
