"""Cases for the CUDA kernels only, run on the host by test_mix_cuda_on_host.py and not collected directly.

If the kernels were not loaded, the reference would raise where these cases expect NaN.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastuft
from fastuft.mix import ops, reference

assert not ops.HAS_CPU_EXTENSION, "the kernels under test would be hidden by those of _C"
torch.ops.load_library(os.environ["FASTUFT_HOST_KERNELS"])
OPS = torch.ops.fastuft


def test_bad_boxes_are_clamped_and_bad_partners_give_nan():
    images = torch.rand(4, 3, 16, 16)
    boxes = torch.tensor([[0, 0, 4, 5], [-5, -5, 99, 99], [0, 0, 4, 4], [9, 9, 2, 2]], dtype=torch.int32)
    partner = torch.tensor([99, 0, -1, 2])
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = (images * 255).to(dtype).contiguous(memory_format=layout)
            mixed = OPS.cutmix(x, boxes, partner)
            poisoned = mixed[0, :, :4, :5]
            assert bool((poisoned == 0).all() if dtype == torch.uint8 else poisoned.isnan().all())
            assert torch.equal(mixed[0, :, 4:], x[0, :, 4:]) and torch.equal(mixed[0, :, :4, 5:], x[0, :, :4, 5:])
            assert torch.equal(mixed[1], x[0]) and torch.equal(mixed[3], x[3])
            assert torch.equal(mixed[2, :, 4:], x[2, :, 4:]) and not torch.equal(mixed[2, :, :4], x[2, :, :4])
            swapped = x.clone()
            OPS.cutmix_(swapped, torch.tensor([[-9, -9, 2**31 - 1, 2**31 - 1], [5, 5, 1, 1]], dtype=torch.int32))
            assert torch.equal(swapped, x[[3, 1, 2, 0]])


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), float("inf")])
def test_bad_weights_and_partners_give_nan(bad):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8):
        x = (torch.rand(4, 3, 8, 8) * 200 + 1).to(dtype)
        mixed = OPS.mixup(x, torch.tensor([bad, 0.5, 1.0, 0.25]), torch.tensor([1, 0, 7, 2]))
        paired = x.clone()
        OPS.mixup_(paired, torch.tensor([bad, 1.0]))
        for poisoned in (mixed[0], mixed[2], paired[0], paired[3]):
            assert bool((poisoned == 0).all() if dtype == torch.uint8 else poisoned.isnan().all())
        assert torch.equal(mixed[3], reference.mixup(x[[3, 2]], torch.tensor([0.25, 1]), torch.tensor([1, 0]))[0])
        assert torch.equal(paired[1:3], x[1:3])


def test_more_samples_than_grid_rows():
    images = torch.arange(65_538 * 2, dtype=torch.float32).view(65_538, 1, 1, 2)
    boxes = torch.tensor([[0, 0, 1, 1]], dtype=torch.int32).expand(65_538, 4).contiguous()
    partner = torch.arange(65_538).flip(0)
    assert torch.equal(OPS.cutmix(images, boxes, partner), reference.cutmix(images, boxes, partner))


def test_samples_beyond_the_largest_grid():
    """More elements than one grid of 4096 blocks of 256 threads."""
    images = torch.randint(0, 255, (2, 1, 1100, 1001), dtype=torch.uint8)  # odd rows: single elements
    boxes = torch.tensor([[1, 2, 1099, 1000]], dtype=torch.int32)
    expected = images.clone()
    reference.cutmix_(expected, boxes)
    OPS.cutmix_(images, boxes)
    assert torch.equal(images, expected)


@pytest.mark.parametrize("group", [2, 3, 6])
def test_pairs_stay_within_groups(group):
    images = torch.rand(6, 3, 5, 16)
    pairs = 6 // group * (group // 2)
    boxes, lam = fastuft.sample_boxes(pairs, 5, 16, generator=torch.Generator().manual_seed(group))
    expected = images.clone()
    reference.cutmix_(expected, boxes, group)
    reference.mixup_(expected, lam, group)
    OPS.cutmix_(images, boxes, group)
    OPS.mixup_(images, lam, group)
    assert torch.equal(images, expected)


def test_nothing_to_do():
    for shape in ((0, 3, 4, 4), (1, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        x = torch.rand(shape)
        half, count = shape[0] // 2, shape[0]
        before = x.clone()
        OPS.cutmix_(x, torch.zeros(half, 4, dtype=torch.int32))
        OPS.mixup_(x, torch.ones(half))
        assert torch.equal(x, before)
        zeros = torch.zeros(count, 4, dtype=torch.int32)
        assert torch.equal(OPS.cutmix(x, zeros, torch.arange(count)), x)
        assert torch.equal(OPS.mixup(x, torch.ones(count), torch.arange(count)), x)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_boxes_in_a_view_leave_the_storage_around_it(data):
    """Cropped rows of a multiple of 16 bytes use vectors; bytes outside the box and the view are unchanged."""
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    dtype = data.draw(st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.float64]))
    height, width = number(1, 6), 16 * number(1, 3)
    start = number(0, 20)
    count = 4 * 3 * height * width
    base = torch.randint(0, 250, (start + count,)).to(dtype)
    whole = base[start:].view(4, 3, height, width)
    if data.draw(st.booleans()):
        whole = whole.view(4, height, width, 3).permute(0, 3, 1, 2)
    left = number(0, width - 1)
    view = whole[..., left : number(left + 1, width)]
    rows = [sorted(number(0, view.shape[2]) for _ in range(2)) for _ in range(2)]
    columns = [sorted(number(0, view.shape[3]) for _ in range(2)) for _ in range(2)]
    boxes = torch.tensor(
        [[top, first, bottom, last] for (top, bottom), (first, last) in zip(rows, columns, strict=True)],
        dtype=torch.int32,
    )
    before = base.clone()
    expected = view.clone()
    reference.cutmix_(expected, boxes)
    fastuft.cutmix_(view, boxes)
    assert torch.equal(view, expected)
    view.copy_(before.as_strided(view.shape, view.stride(), view.storage_offset()))
    assert torch.equal(base, before)
