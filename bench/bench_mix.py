"""CutMix and MixUp of a batch beside PyTorch's expressions, torchvision and Kornia.

Claim: CutMix in place writes only the boxes and allocates nothing; every form runs near the memory bandwidth. The
baseline is the plain PyTorch expression of the same result. torchvision and Kornia draw their own boxes (one for the
batch, or one an image), so their rows move about the same bytes, not the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from harness import interleaved_ratio, measure, peak_extra_bytes, peer
from torch import Tensor

import fastuft
from fastuft.mix import ops, reference

# (images, side, dtype): a CPU trains in float32, a GPU in bfloat16.
SIZES = {"smoke": (8, 32, torch.float32), "cpu": (64, 224, torch.float32), "cuda": (256, 224, torch.bfloat16)}


class Mix(NamedTuple):
    """A batch and how it is to be mixed."""

    images: Tensor
    boxes: Tensor
    partner: Tensor
    lam: Tensor


@pytest.fixture
def make(scale, device):
    """Makes fresh batches, channels_last as in training, with one box and lambda an image (or pair)."""
    count, side, dtype = SIZES[scale]

    def make() -> Mix:
        images = torch.randn(count, 3, side, side, device=device).to(dtype=dtype, memory_format=torch.channels_last)
        boxes, lam = fastuft.sample_boxes(count, side, side)
        return Mix(images, boxes.to(device), torch.arange(count, device=device).flip(0), lam.to(device))

    return make


@pytest.fixture
def run(benchmark, make, scale, ceilings):
    """Time one function of a :class:`Mix` and record the bytes that its operation must move."""
    count, side, dtype = SIZES[scale]
    whole = 2.0 * count * 3 * side * side * dtype.itemsize

    def run(operation, function, *, baseline=False, bytes_moved=whole):
        measure(
            benchmark,
            function,
            make,
            group=f"{operation}, {count} x 3 x {side} x {side} {str(dtype).removeprefix('torch.')}",
            baseline=baseline,
            ceilings=ceilings,
            bytes_moved=bytes_moved,
            dtype=dtype,
            items=count,
            cold=True,
        )

    return run


def test_cutmix(run, make):
    x = make()
    torch.testing.assert_close(
        fastuft.cutmix(x.images, x.boxes, x.partner), reference.cutmix(x.images, x.boxes, x.partner), rtol=0, atol=0
    )
    run("CutMix", lambda *x: fastuft.cutmix(x[0], x[1], x[2]))


def test_cutmix_pytorch(run):
    run("CutMix", lambda *x: reference.cutmix(x[0], x[1], x[2]), baseline=True)


def test_cutmix_in_place(run, make, scale):
    x = make()
    half = len(x.images) // 2
    expected = x.images.clone()
    reference.cutmix_(expected, x.boxes[:half])
    torch.testing.assert_close(fastuft.cutmix_(x.images.clone(), x.boxes[:half]), expected, rtol=0, atol=0)
    # A pair reads and writes both its boxes. Every set of inputs has its own boxes, whose mean area is close to 1/4;
    # the share here is that mean over many draws.
    side = SIZES[scale][1]
    share = float(1 - fastuft.sample_boxes(20_000, side, side)[1].mean())
    whole = 2.0 * x.images.numel() * x.images.element_size()
    run("CutMix in place", lambda *x: fastuft.cutmix_(x[0], x[1][:half]), bytes_moved=whole * share)


def test_cutmix_in_place_pytorch(run, make):
    half = len(make().images) // 2
    run("CutMix in place", lambda *x: reference.cutmix_(x[0], x[1][:half]), baseline=True)


def test_cutmix_torchvision(run, make):
    v2 = peer("torchvision.transforms.v2", "torchvision")
    transform = v2.CutMix(num_classes=2)
    labels = torch.zeros(len(make().images), dtype=torch.int64, device=make().images.device)
    run("CutMix", lambda *x: transform(x[0], labels))


def test_cutmix_kornia(run, make):
    augmentation = peer("kornia.augmentation", "kornia")
    transform = augmentation.RandomCutMixV2(p=1.0, use_correct_lambda=True, data_keys=["input", "class"])
    labels = torch.zeros(len(make().images), dtype=torch.int64, device=make().images.device)
    run("CutMix", lambda *x: transform(x[0], labels))


def test_mixup(run, make):
    x = make()
    torch.testing.assert_close(fastuft.mixup(x.images, x.lam, x.partner), reference.mixup(x.images, x.lam, x.partner))
    run("MixUp", lambda *x: fastuft.mixup(x[0], x[3], x[2]))


def test_mixup_pytorch(run):
    run("MixUp", lambda *x: reference.mixup(x[0], x[3], x[2]), baseline=True)


def test_mixup_in_place(run, make):
    x = make()
    half = len(x.images) // 2
    expected = x.images.clone()
    reference.mixup_(expected, x.lam[:half])
    torch.testing.assert_close(fastuft.mixup_(x.images.clone(), x.lam[:half]), expected)
    run("MixUp in place", lambda *x: fastuft.mixup_(x[0], x[3][:half]))


def test_mixup_in_place_pytorch(run, make):
    half = len(make().images) // 2
    run("MixUp in place", lambda *x: reference.mixup_(x[0], x[3][:half]), baseline=True)


def test_mixup_torchvision(run, make):
    v2 = peer("torchvision.transforms.v2", "torchvision")
    transform = v2.MixUp(num_classes=2)
    labels = torch.zeros(len(make().images), dtype=torch.int64, device=make().images.device)
    run("MixUp", lambda *x: transform(x[0], labels))


@pytest.mark.skipif(not ops.HAS_CPU_EXTENSION, reason="the compiled extension is not built")
def test_in_place_allocates_nothing_and_is_faster():
    images = torch.randn(32, 3, 64, 64).to(memory_format=torch.channels_last)
    boxes, _ = fastuft.sample_boxes(16, 64, 64)
    assert peak_extra_bytes(fastuft.cutmix_, images, boxes) < images.nbytes / 100
    assert interleaved_ratio(fastuft.cutmix_, reference.cutmix_, lambda: (images, boxes)) > 1
