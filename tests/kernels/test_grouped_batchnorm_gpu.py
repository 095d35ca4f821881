"""The grouped BatchNorm kernels on a CUDA device: against float64, at the sizes of a ResNet-50, without synchronization."""

from __future__ import annotations

import pytest
import torch
from error_bound import GRADIENT, VALUE, assert_as_good

from fastuft.kernels.problem import BatchNorm, BatchNormGradient
from fastuft.model.grouped_batchnorm import grouped_batch_norm, portable_backward, portable_forward

pytestmark = pytest.mark.gpu

EPS = 1e-5


def make(images, channels, side, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x, residual, upstream = (
        torch.randn(images, channels, side, side, generator=generator, device="cuda")
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    weight, bias = (torch.randn(channels, generator=generator, device="cuda") for _ in range(2))
    return x, weight, bias, residual, upstream


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(64, 64, 56), (64, 24, 7), (64, 2048, 7)], ids=str)
def test_values_and_gradients_against_float64(size, dtype):
    tensors = make(*size, dtype)
    leaves = [t.clone().requires_grad_() for t in tensors[:4]]
    out, means, variances, scales = grouped_batch_norm(BatchNorm(*leaves, 32, EPS, True))
    found = torch.autograd.grad(out, leaves, tensors[4])
    wide = [t.double() for t in tensors]
    exact, pytorch = (
        portable_forward(BatchNorm(*wide[:4], 32, EPS, True)),
        portable_forward(BatchNorm(*tensors[:4], 32, EPS, True)),
    )
    for ours, truth, theirs in zip((out, means, variances, scales), exact, pytorch, strict=True):
        assert_as_good(ours, truth, theirs, VALUE)
    out = out.detach()
    truth = portable_backward(BatchNormGradient(wide[4], *wide[:2], out.double(), exact[1], exact[3], 32, EPS, True))
    theirs = portable_backward(BatchNormGradient(tensors[4], *tensors[:2], out, pytorch[1], pytorch[3], 32, EPS, True))
    for a, b, c in zip(found, truth, theirs, strict=True):
        assert_as_good(a, b, c, GRADIENT)


def test_the_kernels_are_used():
    from torch.profiler import ProfilerActivity, profile

    tensors = make(64, 64, 14, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in tensors[:4]]
    grouped_batch_norm(BatchNorm(*leaves, 32, EPS, True))[0].backward(tensors[4])
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        grouped_batch_norm(BatchNorm(*leaves, 32, EPS, True))[0].backward(tensors[4])
        torch.cuda.synchronize()
    launched = {event.key for event in run.key_averages()}
    assert {"statistics_kernel", "normalize_kernel", "gradient_sums_kernel", "gradient_kernel"} <= launched
    assert not any("batch_norm" in name for name in launched)
