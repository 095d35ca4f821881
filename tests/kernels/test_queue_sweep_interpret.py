"""Numerics of the fused kernels in Triton's interpreter, against float64."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
import torch
from error_bound import GRADIENT, VALUE, assert_as_good, relative_error
from loss_truth import comparisons, in_dtype
from torch.nn import functional as F

import fastuft
from fastuft.kernels.problem import LseProblem, Problem, tile_precision
from fastuft.loss import reference

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1, 16), (3, 5, 64), (66, 130, 128), (5, 130, 48), (10, 1000, 32)]
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every allocation starts as NaN, so unwritten elements are detected."""
    empty = torch.empty

    def poisoned_empty(*arguments, **options):
        result = empty(*arguments, **options)
        return result.fill_(torch.nan) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty", poisoned_empty)


def sweep():
    from fastuft.kernels import queue_sweep

    return queue_sweep


def make(batch, keys, width, dtype, *, queue_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k_a, k_b = (torch.randn(batch, width, generator=generator).to(dtype) for _ in range(3))
    queue = F.normalize(torch.randn(keys, width, generator=generator), dim=1).to(queue_dtype or dtype)
    return q, k_a, k_b, torch.rand(batch, generator=generator), queue


def run(q, k_a, k_b, lam, queue, temperature=0.2, normalize=True, need_grad=True, **changes):
    """(loss [B], gradient [B, D], alignment [B]) of the kernels."""
    problem = Problem(
        q, k_a, k_b, lam, queue, None, temperature, normalize, False, "auto", "none", need_grad, "triton"
    )._replace(**changes)
    return sweep().mixed_info_nce(problem)


def run_lse(z, queue, need_mu=True):
    return sweep().queue_lse(LseProblem(z, queue, None, 0.2, "auto", need_mu, "triton"))


TILES = {"ieee": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check(q, k_a, k_b, lam, queue, temperature=0.2, normalize=True, precision="auto", **options):
    tensors = (q, k_a, k_b, lam, queue)
    originals = [t.clone() for t in tensors]
    loss, grad, _ = run(*tensors, temperature, normalize, precision=precision, **options)
    exact = in_dtype(tensors, torch.float64, temperature, normalize)
    tiles = TILES[tile_precision(precision, q.dtype, queue.dtype)]
    losses, gradients = comparisons(tensors, tiles, temperature, normalize)
    assert_as_good(loss, exact[0], losses, VALUE)
    assert_as_good(grad, exact[1], gradients, GRADIENT)
    for before, after in zip(originals, tensors, strict=True):
        assert torch.equal(before, after), "an input was changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_loss_and_gradient_against_float64(size, dtype):
    check(*make(*size, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("size", [(64, 4096, 128), (17, 300, 512), (130, 700, 256)], ids=str)
def test_larger_sizes_against_float64(size, dtype):
    check(*make(*size, dtype))


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_any_temperature_matches_float64(temperature):
    check(*make(20, 150, 32, torch.float32), temperature=temperature)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_one_weight_applies_to_all_rows(lam):
    q, k_a, k_b, _, queue = make(9, 70, 32, torch.float32)
    check(q, k_a, k_b, torch.tensor([lam]), queue)


def test_equal_keys_give_equation_4():
    q, k, _, _, queue = make(9, 70, 32, torch.float32)
    one = run(q, k, None, None, queue)
    exact = reference.info_nce(q.double(), k.double(), queue.double())
    assert relative_error(one[0], exact) < 1e-5
    both = run(q, k, k, torch.rand(9), queue)
    assert relative_error(both[0], exact) < 1e-5 and relative_error(both[1], one[1]) < 1e-5


def test_docstring_expression():
    """The PyTorch expression in the kernel's docstring equals the kernel."""
    line = re.search(r"Equals.*?::\n\n\s+(.*?)\n\n", sweep().__doc__, re.DOTALL)[1]
    z, k, _, _, queue = make(6, 40, 32, torch.float32)
    z, k = F.normalize(z, dim=1), F.normalize(k, dim=1)
    expected = eval(line, {"F": F, "torch": torch, "z": z, "k": k, "queue": queue, "tau": 0.2})
    loss, *_ = run(z, k, None, None, queue, normalize=False)
    torch.testing.assert_close(loss.mean(), expected)


def test_queries_in_the_queue_and_unnormalized_rows():
    q, k_a, k_b, lam, queue = make(12, 90, 32, torch.float32)
    queue[:12] = F.normalize(q, dim=1)
    check(q, k_a, k_b, lam, queue, temperature=0.02)
    check(q, k_a, k_b, lam, 30 * queue)
    check(q, k_a, k_b, lam, queue, normalize=False)


@pytest.fixture
def force(monkeypatch):
    """Overrides fields of the launch or the number of programs."""
    launch, plan_units = sweep().launch, sweep().plan_units

    def force(programs=None, **fields):
        def planned(*arguments):
            plan = plan_units(*arguments)
            return replace(plan, units_per_program=-(-plan.units // programs)) if programs else plan

        monkeypatch.setattr(sweep(), "launch", lambda *chip: replace(launch(*chip), **fields))
        monkeypatch.setattr(sweep(), "plan_units", planned)

    return force


def test_growing_maxima_are_rescaled():
    """Later keys dominate, tile after tile."""
    q, k_a, k_b, lam, queue = make(8, 256, 32, torch.float32)
    check(q, k_a, k_b, lam, queue * torch.linspace(0.1, 60, 256)[:, None])


@pytest.mark.parametrize("keys", [1, 31, 32, 33, 64, 90])
def test_queues_around_whole_tiles(keys, force):
    inputs = make(9, keys, 32, torch.float32)
    for programs in (1, 2):
        force(programs, block_k=32)
        check(*inputs)


@pytest.mark.parametrize("unit", [False, True], ids=["maximum", "unit"])
@pytest.mark.parametrize("keys", [64, 70])
def test_descriptors_and_pointers_agree_bit_for_bit(keys, unit, force):
    inputs = make(9, keys, 32, torch.bfloat16)
    found = []
    for descriptors in (True, False):
        force(descriptors=descriptors)
        check(*inputs, unit_queue=unit)
        found.append(run(*inputs, unit_queue=unit))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("precision", ["ieee", "bf16", "fp16"])
@pytest.mark.parametrize("temperature", [0.03, 0.05, 0.2])
def test_unit_rows_at_any_temperature(temperature, precision):
    """Opposite, equal and random rows: the constant of (1) suffices from tau = 0.05 on, else the maximum is needed."""
    q, k_a, k_b, lam, queue = make(6, 70, 32, torch.float32)
    queue[:6], queue[6:12] = F.normalize(q, dim=1), -F.normalize(q, dim=1)
    check(q, k_a, k_b, lam, queue, temperature, precision=precision, unit_queue=True)
    check(q, k_a, k_b, lam, queue[6:12], temperature, precision=precision, unit_queue=True)


def test_the_maximum_is_tracked_where_needed():
    problem = Problem(*make(2, 3, 16, torch.float32), None, 0.05, True, True, "auto", "none", True, "triton")
    is_unit = sweep().is_unit
    assert is_unit(problem, "ieee") and is_unit(problem, "bf16") and not is_unit(problem, "fp16")
    for change in ({"temperature": 0.049}, {"normalize": False}, {"unit_queue": False}):
        assert not is_unit(problem._replace(**change), "bf16")


@pytest.mark.parametrize("precision", ["ieee", "bf16", "fp16"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_every_precision_of_every_input(dtypes, precision):
    check(*make(7, 70, 32, dtypes[0], queue_dtype=dtypes[1]), precision=precision)


def test_zero_and_extreme_vectors():
    """The loss does not depend on a query's norm, and the gradient is inversely proportional to it."""
    q, k_a, k_b, lam, queue = make(6, 50, 32, torch.float32)
    k_a[4] = 0
    lengths = torch.tensor([0, 1e30, 1e-9, 1e-30, 1, 1])
    scaled = q * lengths[:, None]
    loss, grad, *_ = run(scaled, k_a, k_b, lam, queue)
    assert loss.isfinite().all() and grad.isfinite().all()
    assert (grad[0] == 0).all() and (grad[3] == 0).all()
    exact, same = (in_dtype((q, k_a, k_b, lam, queue), dtype) for dtype in (torch.float64, torch.float32))
    kept = [1, 2, 4, 5]
    assert_as_good(loss[kept], exact[0][kept], same[0][kept], VALUE)
    assert_as_good((grad.double() * lengths.double()[:, None])[kept], exact[1][kept], same[1][kept], GRADIENT)


def test_empty_queue():
    q, k_a, k_b, lam, _ = make(5, 1, 32, torch.float32)
    nothing = torch.zeros(0, 32)
    loss, grad, _ = run(q, k_a, k_b, lam, nothing)
    assert (loss == 0).all() and (grad == 0).all()
    lse, mu = run_lse(q, nothing)
    assert (lse == -torch.inf).all() and (mu == 0).all()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_mixed_dtypes(dtypes):
    check(*make(7, 60, 32, dtypes[0], queue_dtype=dtypes[1]))


def test_strided_inputs():
    q, k_a, k_b, lam, queue = make(10, 60, 32, torch.float32)
    wide = torch.randn(10, 64)
    wide[:, ::2] = q
    check(wide[:, ::2], k_a.T.contiguous().T, k_b, lam, torch.cat([queue, queue], 1)[:, :32])


def test_strided_weights():
    q, k_a, k_b, lam, queue = make(9, 60, 32, torch.float32)
    gaps = torch.stack([lam, torch.full_like(lam, torch.nan)], 1)[:, 0]
    dense, found = (run(q, k_a, k_b, weight, queue) for weight in (lam, gaps))
    assert all(map(torch.equal, found, dense))


def test_a_nan_query_gives_nan():
    z, _, _, _, queue = make(5, 60, 32, torch.float32)
    expected = run_lse(z, queue)
    z[2] = torch.nan
    for found, good in zip(run_lse(z, queue), expected, strict=True):
        assert found[2].isnan().all()
        torch.testing.assert_close(found[[0, 1, 3, 4]], good[[0, 1, 3, 4]], rtol=1e-6, atol=1e-6)


def test_results_do_not_depend_on_the_number_of_programs(force):
    """Programs may end within a tile of rows, at its end, or beyond it."""
    inputs = make(70, 130, 16, torch.float32)
    exact, same = (in_dtype(inputs, dtype) for dtype in (torch.float64, torch.float32))
    for programs in (1, 2, 3, 5, 7, 12):
        force(programs)
        loss, grad, _ = run(*inputs)
        assert_as_good(loss, exact[0], same[0], VALUE)
        assert_as_good(grad, exact[1], same[1], GRADIENT)


def test_reruns_are_bitwise_equal(force):
    inputs = make(20, 640, 32, torch.float32)
    for programs in (1, 7):
        force(programs)
        assert all(map(torch.equal, run(*inputs), run(*inputs)))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("rows", [True, False], ids=["a row each", "one for all"])
def test_backward_scales_in_fp32_and_casts_last(rows, dtype):
    from fastuft.kernels import queue_combine

    gradient, upstream = torch.randn(70, 40), torch.randn(70) if rows else torch.tensor(1e-6)
    found = queue_combine.scaled_gradient(gradient, upstream, 1e4, dtype)
    expected = (gradient * (upstream * 1e4).reshape(-1, 1)).to(dtype)
    # The interpreter cuts bf16 off where a chip rounds.
    torch.testing.assert_close(found, expected, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


def test_loss_alone_skips_the_gradient():
    q, k_a, k_b, lam, queue = make(20, 100, 32, torch.float32)
    full = run(q, k_a, k_b, lam, queue)
    alone = run(q, k_a, k_b, lam, queue, need_grad=False)
    assert alone[1].shape == (20, 0)
    torch.testing.assert_close(alone[0], full[0])


@pytest.mark.parametrize("bad", [torch.nan, -0.1, 1.1])
def test_a_bad_weight_gives_nan_in_its_row_only(bad):
    q, k_a, k_b, lam, queue = make(4, 30, 32, torch.float32)
    lam[2] = bad
    loss, grad, *_ = run(q, k_a, k_b, lam, queue)
    assert loss.isnan().tolist() == [False, False, True, False] and grad[2].isnan().all() and grad[:2].isfinite().all()


def test_public_functions_run_the_kernels():
    q, k_a, k_b, lam, queue = make(6, 50, 32, torch.float32)
    q.requires_grad_()
    ours = fastuft.mixed_info_nce(q, k_a, k_b, lam, queue, impl="triton")
    portable = fastuft.mixed_info_nce(q, k_a, k_b, lam, queue, impl="torch")
    torch.testing.assert_close(ours, portable)
    first, second = (torch.autograd.grad(loss, q)[0] for loss in (ours, portable))
    torch.testing.assert_close(first, second)
    for found, expected in zip(
        fastuft.queue_lse(q, queue, impl="triton"), fastuft.queue_lse(q, queue, impl="torch"), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("batch", "size"), [(3, 8), (8, 8), (13, 8), (5, 7), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_enqueue_wraps_and_normalizes(batch, size, dtype):
    from fastuft.kernels import enqueue

    expected = fastuft.KeyQueue(size, 24, dtype=dtype)
    expected.pointer.fill_(size - 1)
    keys, pointer = expected.keys.clone(), expected.pointer.clone()
    for _ in range(2):
        new = torch.randn(batch, 24)
        expected.enqueue_(new)
        enqueue.enqueue_(keys, None, pointer, new)
    torch.testing.assert_close(keys, expected.keys)
    assert pointer == expected.pointer
