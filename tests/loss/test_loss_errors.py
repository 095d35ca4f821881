"""Errors for wrong inputs name the argument, its value and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from loss_cases import Case

import fastuft
from fastuft.loss import dispatch, mixed_info_nce_with_terms

CASE = Case.random(4, 10, 16)
FP8_QUEUE = fastuft.KeyQueue(10, 16, dtype=torch.float8_e4m3fn)


def mixed(**changes):
    arguments = {**vars(CASE), "lam": 0.5, **changes}
    return fastuft.mixed_info_nce(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": [1.0]}, "q is a list; it must be a tensor"),
        ({"q": torch.randn(16)}, r"q has shape \(16,\); it must be a matrix"),
        ({"q": torch.ones(4, 16, dtype=torch.int64)}, "q has dtype torch.int64; allowed: float32"),
        ({"q": torch.randn(0, 16)}, r"q has shape \(0, 16\); it needs at least one row"),
        ({"k_a": torch.randn(4, 8)}, "k_a has width 8; it must be the query's, 16"),
        ({"k_b": torch.randn(3, 16)}, "k_b has 3 rows; it must have the query's, 4"),
        ({"k_a": torch.randn(4, 16, device="meta")}, "k_a is on meta but the query is on cpu; move it there"),
        ({"k_a": torch.randn(4, 16, requires_grad=True)}, r"k_a requires grad.*k_a.detach\(\)"),
        ({"k_b": torch.randn(4, 16, requires_grad=True)}, r"k_b requires grad.*k_b.detach\(\)"),
        ({"queue": torch.randn(9, 16, requires_grad=True)}, r"queue requires grad.*queue.detach\(\)"),
        ({"queue": torch.randn(9, 17)}, "queue has width 17; it must be the query's, 16"),
        ({"queue": torch.randn(9)}, r"queue has shape \(9,\); it must be a matrix"),
        ({"queue": fastuft.KeyQueue(9, 17)}, "queue has width 17; it must be the query's, 16"),
        ({"queue": FP8_QUEUE.keys}, r"queue has dtype torch.uint8, .*; pass the KeyQueue itself, not its keys"),
        ({"queue": FP8_QUEUE.keys.view(torch.float8_e4m3fn)}, "queue has dtype torch.float8_e4m3fn.*KeyQueue itself"),
        (
            {"queue": FP8_QUEUE, "precision": "ieee"},
            "precision='ieee' is not allowed with an fp8 queue.*'auto' or 'bf16'",
        ),
        ({"temperature": 0.0}, "temperature=0.0 is out of range; it must be a positive number"),
        ({"temperature": -1}, "temperature=-1 is out of range"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"temperature": "0.2"}, "temperature='0.2' is out of range"),
        ({"lam": 1.5}, r"lam=1.5 is out of range; it must be a number or a tensor \[B\] in \[0, 1\]"),
        ({"lam": float("nan")}, "lam=nan is out of range"),
        ({"lam": torch.tensor([0.1, 0.2, 0.3, -0.5])}, r"lam has values outside \[0, 1\] \(from -0.5 to 0.3\)"),
        ({"lam": torch.tensor(torch.nan)}, r"lam has values outside \[0, 1\]"),
        ({"lam": torch.rand(3)}, r"lam has shape \(3,\).*a float tensor \[4\]"),
        ({"lam": torch.rand(4, 1)}, r"lam has shape \(4, 1\)"),
        ({"lam": torch.ones(4, dtype=torch.int64)}, "lam has shape .* dtype torch.int64"),
        ({"lam": torch.rand(4, requires_grad=True)}, r"lam requires grad.*lam.detach\(\)"),
        ({"lam": torch.rand(4, device="meta")}, "lam is on meta but the query is on cpu"),
        ({"reduction": "max"}, "reduction='max' is not allowed; choose one of 'mean', 'sum', 'none'"),
        ({"impl": "cuda"}, "impl='cuda' is not allowed; choose one of 'auto', 'triton', 'torch'"),
        ({"precision": "fp8"}, "precision='fp8' is not allowed; choose one of 'auto', 'ieee', 'tf32', 'bf16'"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_mixed_info_nce_refuses_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        mixed(**changes)


def test_other_functions_name_their_arguments():
    with pytest.raises(ValueError, match=r"^k has 3 rows"):
        fastuft.info_nce(CASE.q, CASE.k_a[:3], CASE.queue)
    with pytest.raises(ValueError, match=r"^z has shape"):
        fastuft.queue_lse(CASE.q[0], CASE.queue)
    with pytest.raises(ValueError, match="impl='fast' is not allowed"):
        fastuft.queue_lse(CASE.q, CASE.queue, impl="fast")
    with pytest.raises(ValueError, match=r"^k_b has 3 rows"):
        mixed_info_nce_with_terms(CASE.q, CASE.k_a, CASE.k_b[:3], 0.5, CASE.queue)


@pytest.mark.parametrize("module", [fastuft.InfoNCELoss, fastuft.MixedInfoNCELoss])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"reduction": "max"}, {"impl": "cuda"}], ids=str)
def test_modules_refuse_bad_options_when_constructed(module, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        module(**options)


def test_numpy_numbers_are_accepted():
    expected = mixed(temperature=0.25, lam=0.5)
    assert torch.equal(mixed(temperature=np.float32(0.25), lam=np.float32(0.5)), expected)
    assert torch.equal(mixed(temperature=np.float64(0.25), lam=np.float64(0.5)), expected)


@pytest.mark.skipif(dispatch.fused_reason(CASE.q, CASE.queue) is None, reason="interpreter runs")
def test_kernels_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match=r"impl='triton' cannot run: .*; use impl='torch' or 'auto'"):
        mixed(impl="triton")
    with pytest.raises(ValueError, match="impl='triton' cannot run"):
        fastuft.queue_lse(CASE.q, CASE.queue, impl="triton")


@pytest.mark.gpu
def test_kernels_refuse_unsupported_inputs():
    q, k, queue = (t.cuda() for t in (CASE.q, CASE.k_a, CASE.queue))
    with pytest.raises(ValueError, match="float64 has no fused kernel"):
        fastuft.info_nce(q.double(), k, queue, impl="triton")
    with pytest.raises(ValueError, match="a key is float64"):
        fastuft.info_nce(q, k.double(), queue, impl="triton")
    wide = torch.randn(4, 528, device="cuda")
    with pytest.raises(ValueError, match="D=528 is above 512"):
        fastuft.info_nce(wide, wide, wide, impl="triton")
    torch.testing.assert_close(fastuft.info_nce(wide, wide, wide), fastuft.info_nce(wide, wide, wide, impl="torch"))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_bad_weight_on_a_gpu_gives_nan_in_its_row_without_a_sync(impl):
    q, k_a, k_b, queue = (t.cuda() for t in (CASE.q, CASE.k_a, CASE.k_b, CASE.queue))
    lam = torch.tensor([0.5, 2.0, -1.0, torch.nan], device="cuda")
    fastuft.mixed_info_nce(q, k_a, k_b, lam, queue, impl=impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = fastuft.mixed_info_nce(q, k_a, k_b, lam, queue, reduction="none", impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isnan().tolist() == [False, True, True, True]
