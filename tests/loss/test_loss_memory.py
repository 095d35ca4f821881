"""No path ever allocates as much as the [B, K] logits would take."""

from __future__ import annotations

import json

import pytest
import torch
from loss_cases import DTYPES, PATHS, Case, name_of

import fastuft
from fastuft.loss import reference

MEGABYTE = 10**6


def peak_bytes(function, folder, device: str) -> int:
    """Peak of allocated bytes during a call, above those before it."""
    if device == "cuda":
        function()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    trace = folder / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


def run(case: Case, impl: str, what: str) -> None:
    q = case.q.detach().requires_grad_(what != "loss alone")
    if what == "queue_lse":
        fastuft.queue_lse(q, case.queue, impl=impl)[0].sum().backward()
    elif what == "info_nce":
        fastuft.info_nce(q, case.k_a, case.queue, impl=impl).backward()
    else:
        loss = fastuft.mixed_info_nce(q, case.k_a, case.k_b, case.lam, case.queue, impl=impl)
        if loss.requires_grad:
            loss.backward()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("what", ["info_nce", "mixed_info_nce", "loss alone", "queue_lse"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=name_of)
def test_peak_memory_stays_below_the_logits(dtype, what, path, tmp_path):
    device, impl = path
    if dtype == torch.float64 and impl == "triton":
        pytest.skip("no float64 kernel")
    batch, keys = 256, 65536 if device == "cuda" else 16384
    case = Case.random(batch, keys, 128, dtype, device=device)
    peak = peak_bytes(lambda: run(case, impl, what), tmp_path, device)
    assert 0 < peak < min(batch * keys * dtype.itemsize, 10 * MEGABYTE)


def test_tile_memory_does_not_grow_with_the_batch(tmp_path):
    """Extra memory grows with the rows of the query and not with the keys."""
    short, long = (Case.random(3000, keys, 16, torch.bfloat16) for keys in (4096, 16384))
    first, second = (peak_bytes(lambda c=c: run(c, "torch", "mixed_info_nce"), tmp_path, "cpu") for c in (short, long))
    assert second == first < 10 * MEGABYTE


def test_the_memory_measure_detects_the_textbook_expression(tmp_path):
    case = Case.random(64, 4096, 16)
    peak = peak_bytes(lambda: reference.info_nce(case.q, case.k_a, case.queue), tmp_path, "cpu")
    assert peak > 64 * 4096 * 4
