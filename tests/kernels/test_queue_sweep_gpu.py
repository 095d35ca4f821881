"""The fused kernels on a CUDA device: large sizes, no synchronization, little memory."""

from __future__ import annotations

import pytest
import torch
from error_bound import GRADIENT, VALUE, assert_as_good
from loss_truth import comparisons, in_dtype
from torch.nn import functional as F

import fastuft
from fastuft.kernels.problem import Problem
from fastuft.loss import reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(batch, keys, width, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k_a, k_b = (torch.randn(batch, width, generator=generator, device="cuda").to(dtype) for _ in range(3))
    queue = F.normalize(torch.randn(keys, width, generator=generator, device="cuda"), dim=1).to(dtype)
    return q, k_a, k_b, torch.rand(batch, generator=generator, device="cuda"), queue


def problem(q, k_a, k_b, lam, queue):
    return Problem(q, k_a, k_b, lam, queue, None, 0.2, True, False, "auto", "mean", True, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size",
    [(1, 1, 16), (3, 5, 64), (252, 507, 128), (64, 4096, 128), (256, 65536, 128), (130, 5000, 512), (33, 777, 48)],
    ids=str,
)
def test_loss_and_gradient_against_float64(size, dtype):
    tensors = make(*size, dtype)
    q = tensors[0].clone().requires_grad_()
    loss = fastuft.mixed_info_nce(q, *tensors[1:], reduction="none", impl="triton")
    (grad,) = torch.autograd.grad(loss.sum(), q)
    exact, (losses, gradients) = in_dtype(tensors, torch.float64), comparisons(tensors, dtype)
    assert_as_good(loss, exact[0], losses, VALUE)
    assert_as_good(grad, exact[1], gradients, GRADIENT)


@pytest.mark.parametrize("width", [16, 128, 256, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_fp8_queue_equals_its_decoded_rows(dtype, width):
    tensors = make(64, 1000, width, dtype)
    queue = fastuft.KeyQueue(1000, width, dtype=torch.float8_e4m3fn, device="cuda")
    q = tensors[0].clone().requires_grad_()
    loss = fastuft.mixed_info_nce(q, *tensors[1:4], queue, reduction="none", impl="triton")
    (grad,) = torch.autograd.grad(loss.sum(), q)
    decoded = (*tensors[:4], queue.rows())
    tiles = torch.bfloat16 if dtype == torch.float32 else dtype
    exact, (losses, gradients) = in_dtype(decoded, torch.float64), comparisons(decoded, tiles)
    assert_as_good(loss, exact[0], losses, VALUE)
    assert_as_good(grad, exact[1], gradients, GRADIENT)


def test_reruns_are_bitwise_equal():
    tensors = make(256, 65536, 128, torch.bfloat16)
    first, second = (torch.ops.fastuft.mixed_info_nce(*problem(*tensors)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_many_rows():
    q, k, _, _, queue = make(65536, 4096, 128, torch.bfloat16)
    loss = fastuft.info_nce(q, k, queue, reduction="none", impl="triton")
    rows = slice(0, None, 4096)
    exact = reference.info_nce(q[rows].double(), k[rows].double(), queue.double())
    assert_as_good(loss[rows], exact, reference.info_nce(q[rows], k[rows], queue), VALUE)


def test_the_loss_never_synchronizes_and_uses_little_memory():
    q, k_a, k_b, lam, queue = make(256, 65536, 128, torch.bfloat16)
    q.requires_grad_()
    store = fastuft.KeyQueue(65536, 128, dtype=torch.bfloat16, device="cuda")
    fastuft.mixed_info_nce(q, k_a, k_b, lam, queue).backward()  # compiled before the device is watched
    store.enqueue_(k_a)
    q.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fastuft.mixed_info_nce(q, k_a, k_b, lam, queue).backward()
        store.enqueue_(k_a)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 9e6, f"{extra / 1e6:.1f} MB beyond the inputs"


def test_half_gradients_under_a_loss_scale():
    tensors = make(4096, 8192, 128, torch.float16)
    q = tensors[0].clone().requires_grad_()
    scale = 65536.0
    (fastuft.mixed_info_nce(q, *tensors[1:]) * scale).backward()
    exact, pytorch = (in_dtype(tensors, dtype)[1] * (scale / 4096) for dtype in (torch.float64, torch.float32))
    assert_as_good(q.grad, exact, pytorch.half(), GRADIENT)  # PyTorch's fp32 gradient, rounded to fp16 last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_enqueue_equals_the_portable_path(dtype):
    for batch in (1, 100, 256, 700):
        ours = fastuft.KeyQueue(512, 128, device="cuda", dtype=dtype)
        theirs = fastuft.KeyQueue(512, 128, dtype=dtype)
        theirs.load_state_dict(ours.state_dict())
        for _ in range(3):
            keys = torch.randn(batch, 128, device="cuda")
            ours.enqueue_(keys)
            theirs.enqueue_(keys.cpu())
        # A sum in another order can move an element to the next of e4m3's codes, an eighth away.
        close = {"rtol": 0.13, "atol": 1e-4} if dtype == torch.float8_e4m3fn else {}
        torch.testing.assert_close(ours.rows().cpu(), theirs.rows(), **close)
        assert ours.pointer.item() == theirs.pointer.item()
