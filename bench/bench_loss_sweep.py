"""The queue loss over batch and queue sizes: time and extra memory beside the textbook expression.

Claim: time grows with B K, as for the textbook expression, but extra memory does not grow with K: no [B, K] tensor is stored.
"""

from __future__ import annotations

import pytest
import torch
from harness import measure, peak_extra_bytes
from torch import Tensor
from torch.nn import functional as F

import fastuft
from fastuft.loss import reference

WIDTH = 128
# (batches B at the fixed queue, queues K at the fixed batch), fixed (B, K)
SWEEPS = {
    "smoke": ([16, 32], [512, 1024], (32, 1024)),
    "cpu": ([32, 64, 256, 1024], [2**12, 2**14, 2**16], (256, 2**14)),
    "cuda": ([32, 256, 1024, 4096], [2**12, 2**14, 2**16, 2**18], (256, 2**16)),
}


def fused(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    return torch.autograd.grad(fastuft.info_nce(q, k, queue), q)[0]


def textbook(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    return torch.autograd.grad(reference.info_nce(q, k, queue).mean(), q)[0]


WAYS = {"fastuft": fused, "textbook": textbook}


def pytest_generate_tests(metafunc):
    if "size" not in metafunc.fixturenames:
        return
    options = metafunc.config.option
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    batches, queues, (batch, queue) = SWEEPS["smoke" if options.smoke else "cuda" if cuda else "cpu"]
    sizes = list(dict.fromkeys([*((b, queue) for b in batches), *((batch, k) for k in queues)]))
    metafunc.parametrize("size", sizes, ids=lambda size: f"B{size[0]}-K{size[1]}")


@pytest.mark.parametrize("way", sorted(WAYS))
def test_loss_sweep(benchmark, size, way, device, ceilings):
    batch, keys = size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        q, k = (torch.randn(batch, WIDTH, device=device, dtype=dtype) for _ in range(2))
        return q.requires_grad_(), k, F.normalize(torch.randn(keys, WIDTH, device=device), dim=1).to(dtype)

    q, k, queue = inputs()
    truth = textbook(*(x.detach().double().requires_grad_(x is q) for x in (q, k, queue)))
    # The gradient's size falls with the mean over the batch; the bound is relative to its largest entry.
    error = (WAYS[way](q, k, queue).double() - truth).abs().max() / truth.abs().max()
    assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4)
    measure(
        benchmark,
        WAYS[way],
        inputs,
        group=f"loss and gradient, B {batch}, K {keys}, D {WIDTH} {str(dtype).removeprefix('torch.')}",
        baseline=way == "textbook",
        device=device,
        ceilings=ceilings,
        flops=4.0 * batch * keys * WIDTH,
        bytes_moved=float(keys * WIDTH * dtype.itemsize),
        dtype=dtype,
        items=batch,
        info={"B": batch, "K": keys, "D": WIDTH, "impl": way},
    )


def test_extra_memory_does_not_grow_with_the_queue():
    def extra(keys: int) -> int:
        q, k = torch.randn(64, WIDTH, requires_grad=True), torch.randn(64, WIDTH)
        return peak_extra_bytes(fused, q, k, F.normalize(torch.randn(keys, WIDTH), dim=1))

    # On a CPU the results of a bounded number of parts of the queue wait to be merged; these sizes have more parts than that.
    assert extra(2**18) < 1.1 * extra(2**17)
    assert extra(2**18) < 2**18 * 4  # one row of logits
