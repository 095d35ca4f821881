"""The fp8 queue in the kernels, in Triton's interpreter: every code, every rounding, and the sweep bitwise."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

import triton
import triton.language as tl

import fastuft
from fastuft.kernels.fp8 import decode, encode
from fastuft.kernels.problem import LseProblem, Problem
from fastuft.loss import fp8

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]


@triton.jit
def apply(in_ptr, out_ptr, WHICH: tl.constexpr, N: tl.constexpr):
    value = tl.load(in_ptr + tl.arange(0, N))
    found = encode(value).to(tl.uint8) if WHICH == 0 else decode(value, WHICH == 2)
    tl.store(out_ptr + tl.arange(0, N), found)


def through(which, values, dtype):
    """Values passed through the kernels: 0 encodes, 1 decodes bit by bit, 2 decodes by the conversion instruction."""
    out = torch.empty(len(values), dtype=dtype)
    apply[(1,)](values, out, which, len(values))
    return out


@pytest.mark.parametrize("native", [False, True])
def test_decoding_equals_pytorch_for_every_code(native):
    codes = torch.arange(256).to(torch.uint8)
    expected = codes.view(fp8.FP8).float()
    found = through(2 if native else 1, codes, torch.float32)
    finite = expected.isfinite()  # NaN is the scale's
    assert finite.sum() == 254 and torch.equal(found[finite], expected[finite])


def test_rounding_equals_pytorch():
    """All codes, midpoints between neighbors, values close to the midpoints, and random values."""
    codes = torch.arange(127).to(torch.uint8).view(fp8.FP8).float()
    halfway = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([halfway.nextafter(torch.tensor(0.0)), halfway, halfway.nextafter(torch.tensor(1e3))])
    random = torch.randn(3000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-5, 2, 3000)
    values = torch.cat([codes, near, random.clamp(-448, 448)])
    values = F.pad(torch.cat([values, -values]), (0, 8192 - 2 * len(values)))
    assert torch.equal(through(0, values, torch.uint8), values.to(fp8.FP8).view(torch.uint8))


def make(batch, keys, width, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k_a, k_b = (torch.randn(batch, width, generator=generator).to(dtype) for _ in range(3))
    queue = F.normalize(torch.randn(keys, width, generator=generator), dim=1)
    return q, k_a, k_b, torch.rand(batch, generator=generator), fp8.encode(queue)


@pytest.mark.parametrize("unit", [False, True], ids=["maximum", "unit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(5, 130, 48), (3, 64, 16)], ids=str)
def test_the_sweep_equals_that_over_decoded_rows_bitwise(size, dtype, unit):
    from fastuft.kernels import queue_sweep

    *tensors, (codes, scales) = make(*size, dtype)
    options = (0.1, True, unit, "auto", "none", True, "triton")
    decoded = fp8.decode(codes, scales)
    precision = "fp16" if dtype == torch.float16 else "bf16"
    found = queue_sweep.mixed_info_nce(Problem(*tensors, codes, scales, *options))
    wide = Problem(*tensors, decoded, None, *options)._replace(precision=precision)
    expected = queue_sweep.mixed_info_nce(wide)
    assert all(map(torch.equal, found, expected))
    z = F.normalize(tensors[0].float(), dim=1).to(dtype)
    found = queue_sweep.queue_lse(LseProblem(z, codes, scales, 0.1, "auto", True, "triton"))
    expected = queue_sweep.queue_lse(LseProblem(z, decoded, None, 0.1, precision, True, "triton"))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("descriptors", [False, True])
def test_all_ways_to_read_and_decode_agree(descriptors, monkeypatch):
    from fastuft.kernels import queue_sweep

    launch, chip = queue_sweep.launch, queue_sweep.chip
    *tensors, (codes, scales) = make(9, 70, 32, torch.float32)
    problem = Problem(*tensors, codes, scales, 0.2, True, True, "auto", "none", True, "triton")
    expected = queue_sweep.mixed_info_nce(problem)
    monkeypatch.setattr(queue_sweep, "launch", lambda *which: replace(launch(*which), descriptors=descriptors))
    monkeypatch.setattr(queue_sweep, "chip", lambda device: (80, chip(device)[1]))  # decodes bit by bit
    found = queue_sweep.mixed_info_nce(problem)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("batch", "size"), [(3, 8), (13, 8), (5, 7)])
def test_enqueue_rounds_and_scales(batch, size):
    from fastuft.kernels import enqueue

    queue = fastuft.KeyQueue(size, 24, dtype=fp8.FP8)
    queue.pointer.fill_(size - 1)
    keys, scales, pointer = queue.keys.clone(), queue.scales.clone(), queue.pointer.clone()
    for _ in range(2):
        new = torch.randn(batch, 24)
        new[0] = 0
        queue.enqueue_(new)
        enqueue.enqueue_(keys, scales, pointer, new)
    assert pointer == queue.pointer
    # Unit rows whose last bit differs may fall to either side of a boundary between codes.
    assert (keys != queue.keys).sum() <= 1
    same = (keys == queue.keys).all(1)
    torch.testing.assert_close(scales[same], queue.scales[same])


def test_a_nan_key_is_enqueued_as_nan():
    from fastuft.kernels import enqueue

    queue = fastuft.KeyQueue(4, 24, dtype=fp8.FP8)
    new = torch.randn(2, 24)
    new[1, 3] = torch.nan
    enqueue.enqueue_(queue.keys, queue.scales, queue.pointer, new)
    assert queue.scales.isnan().tolist() == [False, True, False, False]
