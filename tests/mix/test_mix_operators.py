"""CutMix and MixUp as registered operators: schemas, autograd, compilation, and checks of their inputs."""

from __future__ import annotations

import pytest
import torch
from mix_cases import DTYPES, fill

import fastuft
from fastuft.mix import ops

BOX = torch.tensor([[0, 0, 2, 2]] * 4, dtype=torch.int32)
PARTNER = torch.tensor([1, 0, 3, 2])
LAM = torch.full((4,), 0.5)


@pytest.mark.parametrize("name", ["cutmix", "cutmix_", "mixup", "mixup_"])
def test_the_fallback_has_the_schema_of_the_extension(name):
    schema = str(getattr(torch.ops.fastuft, name).default._schema)
    assert schema.replace("a!", "a0!") == f"fastuft::{ops.reference_schema(name)}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["cutmix", "cutmix_", "mixup", "mixup_"])
def test_opcheck(name, dtype):
    images = fill([4, 3, 5, 6], dtype, (0, 2, 3, 1), 0)
    boxes, lam = fastuft.sample_boxes(4, 5, 6, generator=torch.Generator().manual_seed(0))
    partner = torch.tensor([3, 2, 1, 0])
    in_place = name.endswith("_")
    if not in_place and dtype.is_floating_point:
        images.requires_grad_()
    arguments = {
        "cutmix": (images, boxes, partner),
        "cutmix_": (images, boxes[:2]),
        "mixup": (images, lam, partner),
        "mixup_": (images, lam[:2].clone()),
    }[name]
    torch.library.opcheck(getattr(torch.ops.fastuft, name), arguments)


def test_gradients():
    images = fill([4, 2, 3, 5], torch.float64, (0, 1, 2, 3), 0).requires_grad_()
    boxes, lam = fastuft.sample_boxes(4, 3, 5, generator=torch.Generator().manual_seed(0))
    partner = torch.tensor([1, 1, 0, 3])
    assert torch.autograd.gradcheck(lambda x: fastuft.cutmix(x, boxes, partner), images)
    assert torch.autograd.gradcheck(lambda x: fastuft.mixup(x, lam, partner), images)


def test_compiles_without_graph_breaks():
    images = fill([4, 3, 8, 8], torch.float32, (0, 2, 3, 1), 0)
    boxes, lam = fastuft.sample_boxes(4, 8, 8, generator=torch.Generator().manual_seed(0))
    partner = torch.tensor([3, 2, 1, 0])

    def mix(x):
        x = fastuft.cutmix(x, boxes, partner) + fastuft.mixup(x, lam, partner)
        fastuft.cutmix_(x, boxes[:2])
        return fastuft.mixup_(x, lam[:2].clone()).sum(1)

    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), mix(images))


def test_in_place_writes_bump_the_version_counter():
    images = torch.rand(4, 3, 4, 4)
    weight = torch.rand(1, requires_grad=True)
    loss = (weight * images).sum()
    fastuft.cutmix_(images, BOX[:2])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_failed_check_does_not_bump_the_version_counter():
    images = torch.rand(4, 3, 4, 4)
    before = images._version
    with pytest.raises(ValueError, match="does not fit"):
        fastuft.cutmix_(images, BOX[:2] + 9)
    assert images._version == before


@pytest.mark.skipif(not ops.HAS_CPU_EXTENSION, reason="the compiled extension _C is not built")
@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("cutmix", lambda: (BOX + 3, PARTNER)),
        ("cutmix", lambda: (BOX, PARTNER + 2)),
        ("cutmix_", lambda: (BOX[:2] - 1,)),
        ("mixup", lambda: (LAM * 3, PARTNER)),
        ("mixup", lambda: (LAM, PARTNER - 1)),
        ("mixup_", lambda: (LAM[:2] * float("nan"),)),
    ],
)
def test_operators_check_values(name, rest):
    """Compiled programs skip the checks of values on the Python side."""
    images = torch.rand(4, 3, 4, 4)
    before = images.clone()
    with pytest.raises(RuntimeError, match=r"boxes|partner|lam"):
        getattr(torch.ops.fastuft, name)(images, *rest())
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fastuft.cutmix(x[0], BOX, PARTNER), r"images is \(3, 4, 4\); it must be a tensor \[B, C, H, W\]"),
        (lambda x: fastuft.cutmix(x.int(), BOX, PARTNER), "images has dtype torch.int32; allowed: uint8"),
        (lambda x: fastuft.cutmix(x, BOX.long(), PARTNER), r"boxes is \(4, 4\) of torch.int64; it must be"),
        (lambda x: fastuft.cutmix(x, BOX[:2], PARTNER), r"boxes is \(2, 4\)"),
        (lambda x: fastuft.cutmix(x, BOX + 3, PARTNER), r"boxes\[0\]=\[3, 3, 5, 5\] does not fit images of 4 x 4"),
        (lambda x: fastuft.cutmix(x, BOX.flip(1), PARTNER), r"boxes\[0\]=\[2, 2, 0, 0\] does not fit"),
        (lambda x: fastuft.cutmix(x, BOX, PARTNER + 2), "partner has values from 2 to 5; allowed: 0 to 3"),
        (lambda x: fastuft.cutmix(x, BOX, PARTNER.int()), "partner is"),
        (lambda x: fastuft.cutmix_(x, BOX), r"boxes is \(4, 4\) of torch.int32; it must be a tensor \[2, 4\]"),
        (lambda x: fastuft.cutmix_(x.requires_grad_(), BOX[:2]), "images requires grad"),
        (lambda x: fastuft.cutmix_(x[:1].expand(4, 3, 4, 4), BOX[:2]), "overlaps itself in memory"),
        (lambda x: fastuft.mixup(x, LAM * 3, PARTNER), "lam has values from 1.5 to 1.5; allowed: 0 to 1"),
        (lambda x: fastuft.mixup(x, LAM.double(), PARTNER), "lam is"),
        (lambda x: fastuft.mixup(x, LAM.requires_grad_(), PARTNER), "lam requires grad"),
        (lambda x: fastuft.mixup_(x, torch.tensor([0.5, float("nan")])), "lam has values"),
        (lambda x: fastuft.mixup_(x, LAM), r"lam is \(4,\)"),
        (lambda x: fastuft.cutmix_(x, BOX, group=3), "group=3 does not divide the batch of 4 images"),
        (lambda x: fastuft.mixup_(x, LAM, group=0), "group=0 does not divide the batch of 4 images"),
        (lambda x: fastuft.cutmix_(x, BOX, group=2), r"boxes is \(4, 4\) of torch.int32; it must be a tensor \[2, 4\]"),
    ],
)
def test_bad_input_is_refused_before_any_write(call, message):
    LAM.requires_grad_(False)
    images = torch.rand(4, 3, 4, 4)
    before = images.clone()
    with pytest.raises(ValueError, match=message):
        call(images)
    LAM.requires_grad_(False)
    assert torch.equal(images.detach(), before)
