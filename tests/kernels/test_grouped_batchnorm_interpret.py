"""Numerics of the grouped BatchNorm kernels in Triton's interpreter, against float64."""

from __future__ import annotations

import os

import pytest
import torch
from error_bound import GRADIENT, VALUE, assert_as_good

from fastuft.kernels.problem import BatchNorm, BatchNormGradient
from fastuft.model.grouped_batchnorm import portable_backward, portable_forward

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]

EPS = 1e-5
# (images, channels, height, width, group): one tile and several, one split and several, odd widths, one position.
SIZES = [(8, 24, 5, 3, 4), (4, 70, 5, 7, 2), (12, 16, 1, 1, 6), (2, 16, 11, 9, 2)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every allocation starts as NaN, so unwritten elements are detected."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned_allocate(*arguments, allocate=allocate, **options):
            result = allocate(*arguments, **options)
            return result.fill_(torch.nan) if result.is_floating_point() else result

        monkeypatch.setattr(torch, name, poisoned_allocate)


def make(size, dtype, offset=0.0):
    images, channels, height, width, _ = size
    generator = torch.Generator().manual_seed(1)
    x, residual, upstream = (
        torch.randn(images, channels, height, width, generator=generator).to(dtype) for _ in range(3)
    )
    x = (3 * x + offset).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator)
    return x, weight, bias, residual, upstream


def check(size, x, weight, bias, residual, upstream, relu):
    from fastuft.kernels import grouped_batchnorm, grouped_batchnorm_gradient

    group, wanted = size[-1], residual is not None
    found = grouped_batchnorm.forward(BatchNorm(x, weight, bias, residual, group, EPS, relu))
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    exact = portable_forward(BatchNorm(*wide, group, EPS, relu))
    pytorch = portable_forward(BatchNorm(x, weight, bias, residual, group, EPS, relu))
    for ours, truth, theirs in zip(found, exact, pytorch, strict=True):
        assert ours.shape == truth.shape
        assert_as_good(ours, truth, theirs, VALUE)
    out = found[0] if relu else None  # the same elements are 0 for all three
    means, scales = pytorch[1], pytorch[3]
    ours = grouped_batchnorm_gradient.backward(
        BatchNormGradient(upstream, x, weight, out, found[1], found[3], group, EPS, wanted)
    )
    truth = portable_backward(
        BatchNormGradient(
            upstream.double(), *wide[:2], None if out is None else out.double(), exact[1], exact[3], group, EPS, wanted
        )
    )
    theirs = portable_backward(BatchNormGradient(upstream, x, weight, out, means, scales, group, EPS, wanted))
    for a, b, c in zip(ours, truth, theirs, strict=True):
        assert a.shape == b.shape
        assert_as_good(a, b, c, GRADIENT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["plain", "relu", "residual"])
def test_values_and_gradients_against_float64(form, dtype):
    x, weight, bias, residual, upstream = make(SIZES[0], dtype)
    check(SIZES[0], x, weight, bias, residual if form == "residual" else None, upstream, form != "plain")


@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_any_number_of_tiles_and_channels(size):
    check(size, *make(size, torch.float32), True)


def test_bfloat16_is_supported():
    """Up to one unit in the last place: the interpreter truncates where a GPU rounds."""
    from fastuft.kernels import grouped_batchnorm, grouped_batchnorm_gradient

    x, weight, bias, residual, upstream = make(SIZES[0], torch.bfloat16)
    out, means, variances, scales = grouped_batchnorm.forward(BatchNorm(x, weight, bias, residual, 4, EPS, True))
    wide = [t.double() for t in (x, weight, bias, residual)]
    exact = portable_forward(BatchNorm(*wide, 4, EPS, True))
    torch.testing.assert_close(out.double(), exact[0], rtol=2**-7, atol=1e-5)
    for ours, truth in zip((means, variances, scales), exact[1:], strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    ours = grouped_batchnorm_gradient.backward(BatchNormGradient(upstream, x, weight, out, means, scales, 4, EPS, True))
    truth = portable_backward(
        BatchNormGradient(upstream.double(), *wide[:2], out.double(), exact[1], exact[3], 4, EPS, True)
    )
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=1e-4)


def test_without_affine_parameters():
    x, _, _, _, upstream = make(SIZES[0], torch.float32)
    check(SIZES[0], x, None, None, None, upstream, False)


def test_large_means_cause_no_cancellation():
    size = (2, 16, 24, 24, 1)
    x, weight, bias, _, upstream = make(size, torch.float32, offset=3000.0)
    check(size, x, weight, bias, None, upstream, False)


def test_a_nan_stays_in_its_group_and_channel():
    from fastuft.kernels import grouped_batchnorm

    x, weight, bias, _, _ = make(SIZES[0], torch.float32)
    x[1, 3, 0, 0] = torch.nan
    out = grouped_batchnorm.forward(BatchNorm(x, weight, bias, None, 4, EPS, True))[0]
    assert out[:4, 3].isnan().all()
    out[:4, 3] = 0
    assert out.isfinite().all()


def test_gradients_arrive_in_any_layout():
    from fastuft.kernels import grouped_batchnorm, grouped_batchnorm_gradient

    x, weight, bias, _, _ = make(SIZES[0], torch.float32)
    out, means, _, scales = grouped_batchnorm.forward(BatchNorm(x, weight, bias, None, 4, EPS, True))
    pooled = torch.randn(x.shape[:2])[:, :, None, None].expand_as(x)  # as global average pooling hands it back
    first = grouped_batchnorm_gradient.backward(BatchNormGradient(pooled, x, weight, out, means, scales, 4, EPS, False))
    second = grouped_batchnorm_gradient.backward(
        BatchNormGradient(pooled.contiguous(), x, weight, out, means, scales, 4, EPS, False)
    )
    assert all(map(torch.equal, first, second))


def test_reruns_are_bitwise_equal():
    from fastuft.kernels import grouped_batchnorm

    x, weight, bias, residual, _ = make(SIZES[1], torch.float16)
    first, second = (grouped_batchnorm.forward(BatchNorm(x, weight, bias, residual, 2, EPS, True)) for _ in range(2))
    assert all(map(torch.equal, first, second))
