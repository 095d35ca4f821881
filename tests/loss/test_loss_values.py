"""Values and gradients against float64."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from error_bound import GRADIENT, VALUE, assert_as_good, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DTYPES, PATHS, Case, name_of
from torch.nn import functional as F

import fastuft
from fastuft.loss import LossOptions, info_nce_with_terms, mixed_info_nce_with_terms, portable, reference

SIZES = [(1, 1, 16), (3, 5, 64), (252, 507, 128), (64, 4096, 128), (5, 130, 48), (2, 30, 7), (4, 70, 520)]


@pytest.fixture(autouse=True)
def poisoned():
    """Every allocation starts as NaN, so unwritten elements are detected."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(size, dtype, path):
    device, impl = path
    if impl == "triton" and size[2] > 512:
        pytest.skip("the kernels go up to D=512")
    Case.random(*size, dtype, device=device).check(impl)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_full_queue_matches_float64(dtype, path):
    device, impl = path
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("in test_a_full_half_precision_queue_matches_float64")
    Case.random(256, 65536, 128, dtype, device=device).check(impl)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_a_full_half_precision_queue_matches_float64(dtype):
    Case.random(256, 65536, 128, dtype).check("torch")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.2, 1.0])
def test_any_temperature_matches_float64(temperature, normalize, path):
    device, impl = path
    case = Case.random(20, 300, 32, device=device, temperature=temperature, normalize=normalize)
    if not normalize:
        case = replace(case, q=F.normalize(case.q, dim=1), k_a=F.normalize(case.k_a, dim=1))
    case.check(impl)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 1, "row"])
def test_any_weight_matches_float64(lam, path):
    device, impl = path
    lam = torch.tensor([0.0, 0.5, 1.0] * 3, device=device) if lam == "row" else lam
    replace(Case.random(9, 70, 32, device=device), lam=lam).check(impl)


@pytest.mark.parametrize("path", PATHS)
def test_forms_of_one_weight_agree(path):
    device, impl = path
    case = Case.random(9, 70, 32, device=device)
    weights = [0.25, torch.tensor(0.25), torch.full((1,), 0.25), torch.full((9,), 0.25), torch.full((9,), 0.25).half()]
    found = [replace(case, lam=w.to(device) if isinstance(w, torch.Tensor) else w).run(impl=impl) for w in weights]
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("path", PATHS)
def test_equal_keys_give_equation_4(path):
    device, impl = path
    case = Case.random(33, 500, 64, device=device)
    q = case.q.requires_grad_()
    single = fastuft.info_nce(q, case.k_a, case.queue, reduction="none", impl=impl)
    (gradient,) = torch.autograd.grad(single.sum(), q)
    both = replace(case, k_b=case.k_a).run(reduction="none", impl=impl)
    assert relative_error(both[0], single) < 1e-6 and relative_error(both[1], gradient) < 1e-5
    exact = reference.info_nce(case.q.double(), case.k_a.double(), case.queue.double())
    assert relative_error(single, exact) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_queries_in_the_queue_and_unnormalized_rows(path):
    device, impl = path
    case = Case.random(12, 90, 32, device=device)
    case.queue[:12] = F.normalize(case.q, dim=1)
    replace(case, temperature=0.02).check(impl)
    replace(case, queue=30 * case.queue).check(impl)
    replace(case, queue=case.queue * torch.linspace(0.1, 60, 90, device=device)[:, None]).check(impl)
    replace(case, q=1e-3 * case.q, k_a=1e3 * case.k_a).check(impl)


@pytest.mark.parametrize("path", PATHS)
def test_zero_and_extreme_vectors(path):
    """The loss does not depend on a query's norm, and the gradient is inversely proportional to it."""
    device, impl = path
    plain = Case.random(6, 50, 32, device=device)
    plain.k_a[4] = 0
    lengths = torch.tensor([0, 1e30, 1e-9, 1e-30, 1, 1], device=device)
    loss, gradient = replace(plain, q=plain.q * lengths[:, None]).run(reduction="none", impl=impl)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert (gradient[0] == 0).all() and (gradient[3] == 0).all()
    exact, pytorch = (plain.to(dtype).run(reference.mixed_info_nce) for dtype in (torch.float64, torch.float32))
    kept = [1, 2, 4, 5]
    assert_as_good(loss[kept], exact[0][kept], pytorch[0][kept], VALUE)
    gradient = gradient.double() * lengths.double()[:, None]
    assert_as_good(gradient[kept], exact[1][kept], pytorch[1][kept], GRADIENT)


@pytest.mark.parametrize("path", PATHS)
def test_empty_queue(path):
    device, impl = path
    case = Case.random(5, 0, 32, device=device)
    loss, gradient = case.run(reduction="none", impl=impl)
    assert (loss == 0).all() and (gradient == 0).all()
    z = case.q.requires_grad_()
    lse, mu = fastuft.queue_lse(z, case.queue, impl=impl)
    assert (lse == -math.inf).all() and (mu == 0).all() and mu.shape == (5, 32)
    assert (torch.autograd.grad(lse.sum(), z)[0] == 0).all()


@pytest.mark.parametrize("keys", [1023, 1024, 3 * 1024, 5 * 1024 + 7])
def test_the_lse_of_queue_parts_merges(keys, monkeypatch):
    """More parts than one call of the attention operator takes, a remainder, several blocks of rows."""
    monkeypatch.setattr(portable, "_PART_BYTES", 1)  # parts of 1024 keys
    monkeypatch.setattr(portable, "_PARTS", 2)
    monkeypatch.setattr(portable, "_PARTIAL_BYTES", 2 * 4 * 16 * 5)  # 5 rows at once
    Case.random(12, keys, 16).check("torch")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "queue_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.bfloat16, torch.float16)],
    ids=name_of,
)
def test_mixed_dtypes(dtype, queue_dtype, path):
    device, impl = path
    Case.random(17, 200, 32, dtype, queue_dtype=queue_dtype, device=device).check(impl)
    case = Case.random(17, 200, 32, dtype, device=device)
    replace(case, k_a=case.k_a.float(), k_b=case.k_b.half()).check(impl)


@pytest.mark.parametrize("path", PATHS)
def test_strided_inputs(path):
    device, impl = path
    case = Case.random(10, 60, 32, device=device)
    wide = torch.randn(10, 64, device=device)
    wide[:, ::2] = case.q
    strided = replace(
        case,
        q=wide[:, ::2],
        k_a=case.k_a.T.contiguous().T,
        lam=torch.rand(20, device=device)[::2],
        queue=torch.cat([case.queue, case.queue], 1)[:, 32:],
    )
    assert not any(t.is_contiguous() for t in (strided.q, strided.k_a, strided.lam, strided.queue))
    strided.check(impl)
    replace(case, queue=case.queue.T.contiguous().T).check(impl)
    replace(case, q=case.q.T.contiguous().T).check(impl)
    z, queue = F.normalize(case.q, dim=1), case.queue
    expected = fastuft.queue_lse(z, queue, impl=impl)
    for other in (z.T.contiguous().T, torch.cat([z, z], 1)[:, ::2], z[:, :1].expand(10, 32)):
        for found, exact in zip(
            fastuft.queue_lse(other, queue, impl=impl),
            reference.queue_lse(other.double(), queue.double(), 0.2),
            strict=True,
        ):
            assert relative_error(found, exact) < 1e-5
    assert all(map(torch.equal, fastuft.queue_lse(z.T.contiguous().T, queue, impl=impl), expected))
    replace(case, k_b=case.k_b[:1].expand(10, 32)).check(impl)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_queue_lse(dtype, path):
    device, impl = path
    case = Case.random(33, 700, 64, dtype, device=device)

    def run(z, queue, function, **options):
        z = z.detach().requires_grad_()
        lse, mu = function(z, queue, 0.2, **options)
        return lse.detach(), mu.detach(), torch.autograd.grad(lse.sum(), z)[0], mu

    lse, mu, gradient, output = run(case.q, case.queue, fastuft.queue_lse, impl=impl)
    exact = run(case.q.double(), case.queue.double(), reference.queue_lse)
    pytorch = run(case.q, case.queue, reference.queue_lse)
    assert lse.dtype == mu.dtype == torch.float32 and not output.requires_grad
    assert_as_good(lse, exact[0], pytorch[0], VALUE)
    assert_as_good(mu, exact[1], pytorch[1], VALUE)
    assert_as_good(gradient, exact[2], pytorch[2], GRADIENT)


@pytest.mark.parametrize("path", PATHS)
def test_reductions_and_modules(path):
    device, impl = path
    case = Case.random(7, 40, 16, device=device)
    rows = fastuft.mixed_info_nce(case.q, case.k_a, case.k_b, case.lam, case.queue, reduction="none", impl=impl)
    assert rows.shape == (7,)
    for reduction in ("mean", "sum"):
        loss = fastuft.MixedInfoNCELoss(reduction=reduction, impl=impl)
        found = loss(case.q, case.k_a, case.k_b, case.lam, case.queue)
        torch.testing.assert_close(found, getattr(rows, reduction)())
        assert repr(loss).startswith("MixedInfoNCELoss(temperature=0.2, normalize=True")
    single = fastuft.InfoNCELoss(0.07, normalize=False, reduction="none", impl=impl)(case.q, case.k_a, case.queue)
    torch.testing.assert_close(single, reference.info_nce(case.q, case.k_a, case.queue, 0.07, normalize=False))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("keys", [0, 90])
def test_terms_sum_to_the_loss(keys, path):
    """Eq. 1-3: the loss is alignment plus distribution."""
    device, impl = path
    case = Case.random(12, keys, 32, device=device)
    q, k_a, k_b, lam, queue = (t.double() for t in (case.q, case.k_a, case.k_b, case.lam, case.queue))
    z, z_a, z_b = (F.normalize(t, dim=1) for t in (q, k_a, k_b))
    a, b = (z * z_a).sum(1) / 0.2, (z * z_b).sum(1) / 0.2
    lse = (z @ queue.T / 0.2).logsumexp(1)

    loss, alignment, distribution = info_nce_with_terms(
        case.q.requires_grad_(), case.k_a, case.queue, LossOptions(impl=impl)
    )
    assert loss.requires_grad and not alignment.requires_grad and not distribution.requires_grad
    torch.testing.assert_close(alignment.double(), -a.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(distribution.double(), torch.logaddexp(a, lse).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.detach(), alignment + distribution, rtol=1e-5, atol=1e-6)

    loss, alignment, distribution = mixed_info_nce_with_terms(
        case.q, case.k_a, case.k_b, case.lam, case.queue, LossOptions(impl=impl)
    )
    torch.testing.assert_close(alignment.double(), -(lam * a + (1 - lam) * b).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.detach(), alignment + distribution, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_reruns_are_bitwise_equal(path):
    device, impl = path
    case = Case.random(70, 3000, 64, device=device)
    first, second = (case.run(impl=impl) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
def test_the_chunked_sweep_equals_the_attention_operator(dtype):
    """The two sweeps of the portable path agree at sizes around their tiles."""
    for batch, keys in ((1, 1), (1030, 5), (3, 1024), (5, 1025), (1025, 2049)):
        case = Case.random(batch, keys, 16, dtype)
        z = F.normalize(case.q.to(torch.promote_types(dtype, torch.float32)), dim=1)
        found = portable._sweep_chunked(z, portable.Queue(case.queue, None), 0.2, True)
        exact = reference.queue_lse(z.double(), case.queue.double(), 0.2)
        swept = portable.queue_lse(z, portable.Queue(case.queue, None), 0.2, True)
        for ours, other, truth in zip(found, swept, exact, strict=True):
            assert relative_error(ours, truth) < 2e-6 and relative_error(other, truth) < 2e-6
        alone = portable.queue_lse(z, portable.Queue(case.queue, None), 0.2, False)
        assert alone[1].shape == (batch, 0) and relative_error(alone[0], exact[0]) < 2e-6


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_gradients_under_a_loss_scale(path):
    """In fp16 at B = 4096, gradients of the mean do not underflow, because they are scaled in fp32 and cast last."""
    device, impl = path
    case = Case.random(4096, 512, 64, torch.float16, device=device)
    scale = 65536.0
    q = case.q.detach().requires_grad_()
    loss = fastuft.mixed_info_nce(q, case.k_a, case.k_b, case.lam, case.queue, impl=impl)
    (loss * scale).backward()
    exact, pytorch = (case.to(dtype).run(reference.mixed_info_nce)[1] for dtype in (torch.float64, torch.float32))
    assert q.grad.dtype == torch.float16
    # PyTorch's fp32 gradient, scaled and rounded to fp16 last: what its own fp16 expression cannot reach.
    exact, pytorch = exact * (scale / 4096), (pytorch * (scale / 4096)).half()
    assert_as_good(q.grad, exact, pytorch, GRADIENT)
    if impl == "torch":  # the kernels multiply fp16 tiles, which small elements show
        small = exact.abs() < exact.abs().median()  # rounded before the scale, they would be subnormal
        assert_as_good(q.grad[small], exact[small], pytorch[small], GRADIENT)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_largest_batch(path):
    device, impl = path
    case = Case.random(65536, 300, 128, device=device)
    loss, gradient = case.run(reduction="none", impl=impl)
    rows = torch.randint(65536, (200,), generator=torch.Generator().manual_seed(0)).to(device)
    part = Case(case.q[rows], case.k_a[rows], case.k_b[rows], case.lam[rows], case.queue)
    exact, pytorch = (part.to(dtype).run(reference.mixed_info_nce) for dtype in (torch.float64, torch.float32))
    assert_as_good(loss[rows], exact[0], pytorch[0], VALUE)
    assert_as_good(gradient[rows], exact[1], pytorch[1], GRADIENT)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_float64_inputs_are_exact():
    case = Case.random(9, 2100, 24, torch.float64)
    case = replace(case, lam=case.lam.double())
    found, exact = case.run(reduction="none", impl="torch"), case.run(reference.mixed_info_nce)
    assert found[0].dtype == found[1].dtype == torch.float64
    assert relative_error(found[0], exact[0]) < 1e-13 and relative_error(found[1], exact[1]) < 1e-12


@pytest.mark.parametrize("function", [fastuft.info_nce, fastuft.mixed_info_nce, fastuft.queue_lse])
def test_docstring_expressions(function):
    """The PyTorch expressions in a docstring equal the function."""
    case = Case.random(6, 40, 16)
    names = {
        "F": F,
        "torch": torch,
        "B": 6,
        "temperature": 0.2,
        "info_nce": fastuft.info_nce,
        "z": case.q,
        "q": case.q,
        "k": case.k_a,
        "k_a": case.k_a,
        "k_b": case.k_b,
        "lam": 0.3,
        "queue": case.queue,
    }
    block = re.search(r"::\n\n((?:    .*\n)+)|Equals ``([^`]+)``", function.__doc__)
    *lines, last = re.sub(r"^ +", "", block[1] or block[2].replace("; ", "\n"), flags=re.MULTILINE).strip().split("\n")
    exec("\n".join(lines), names)
    expected = eval(last, names)
    found = {
        fastuft.info_nce: lambda: function(case.q, case.k_a, case.queue),
        fastuft.mixed_info_nce: lambda: function(case.q, case.k_a, case.k_b, 0.3, case.queue),
        fastuft.queue_lse: lambda: function(case.q, case.queue),
    }[function]()
    torch.testing.assert_close(found, expected)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 20),
    keys=st.integers(0, 40),
    width=st.integers(1, 40),
    temperature=st.floats(0.02, 2),
    lam=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_shape_matches_float64(batch, keys, width, temperature, lam, seed):
    Case.random(batch, keys, width, seed=seed, temperature=temperature, lam=lam).check("torch")
