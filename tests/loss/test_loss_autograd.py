"""The operators under autograd, torch.compile, autocast, loss scaling and torch.library's checks."""

from __future__ import annotations

import pytest
import torch
from error_bound import relative_error
from loss_cases import FP8, PATHS, Case, name_of
from torch import library, nn

import fastuft
from fastuft.kernels.problem import LseProblem, Problem
from fastuft.loss import LossOptions, mixed_info_nce_with_terms, reference


def double_case() -> Case:
    case = Case.random(5, 13, 6, torch.float64)
    return Case(case.q, case.k_a, case.k_b, torch.rand(5, dtype=torch.float64), case.queue)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize):
    case = double_case()
    q = case.q.requires_grad_()

    def mixed(q):
        return fastuft.mixed_info_nce(
            q, case.k_a, case.k_b, case.lam, case.queue, normalize=normalize, reduction="none", impl="torch"
        )

    def single(q):
        return fastuft.info_nce(q, case.k_a, case.queue, normalize=normalize, impl="torch")

    assert torch.autograd.gradcheck(mixed, q)
    assert torch.autograd.gradcheck(single, q)
    assert torch.autograd.gradcheck(lambda q: fastuft.queue_lse(q, case.queue, impl="torch")[0], q)
    assert torch.autograd.gradcheck(lambda q: single(3 * q.exp()), q)


@pytest.mark.parametrize("path", PATHS)
def test_any_upstream_gradient_is_applied(path):
    device, impl = path
    case = Case.random(9, 70, 16, device=device)
    upstream = torch.randn(9, device=device)

    def gradient(function, **options):
        q = case.q.detach().requires_grad_()
        function(q, case.k_a, case.k_b, case.lam, case.queue, **options).backward(upstream)
        return q.grad

    found = gradient(fastuft.mixed_info_nce, reduction="none", impl=impl)
    assert relative_error(found, gradient(reference.mixed_info_nce)) < 1e-5


def problem(case: Case, q: torch.Tensor, **changes) -> Problem:
    """The operator's arguments for a case."""
    tensors = (q, case.k_a, case.k_b, case.lam, case.queue)
    return Problem(*tensors, None, 0.2, True, False, "auto", "mean", True, "auto")._replace(**changes)


def outputs(q: torch.Tensor, case: Case, impl: str) -> dict[str, torch.Tensor]:
    """All differentiable outputs of the room, as scalars."""
    arguments = (q, case.k_a, case.k_b, case.lam, case.queue)
    return {
        "info_nce": fastuft.info_nce(q, case.k_a, case.queue, impl=impl),
        "mixed_info_nce": fastuft.mixed_info_nce(*arguments, impl=impl),
        "queue_lse": fastuft.queue_lse(q, case.queue, impl=impl)[0].mean(),
        "terms": mixed_info_nce_with_terms(*arguments, LossOptions(impl=impl))[0],
    }


@pytest.mark.parametrize("path", PATHS)
def test_backward_twice(path):
    device, impl = path
    case = Case.random(9, 70, 16, device=device)
    q = case.q.requires_grad_()
    for name, loss in outputs(q, case, impl).items():
        first = torch.autograd.grad(loss, q, retain_graph=True)[0]
        second = torch.autograd.grad(2 * loss, q)[0]
        assert first.any(), name
        torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["info_nce", "mixed_info_nce", "queue_lse", "terms"])
def test_double_backward_raises(name, path):
    device, impl = path
    case = Case.random(9, 70, 16, device=device)
    q = case.q.requires_grad_()
    for factor in (1.0, q.square().sum()):  # a constant and a differentiable upstream gradient
        (gradient,) = torch.autograd.grad(outputs(q, case, impl)[name] * factor, q, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable only once"):
            torch.autograd.grad(gradient.square().sum(), q, allow_unused=True)


def test_the_query_may_change_between_two_backward_passes():
    case = Case.random(9, 70, 16)
    q = case.q.requires_grad_()
    loss = fastuft.info_nce(q, case.k_a, case.queue)
    first = torch.autograd.grad(loss, q, retain_graph=True)[0]
    with torch.no_grad():
        q.sub_(first)
    assert torch.equal(torch.autograd.grad(loss, q)[0], first)


def test_double_backward_of_the_operator_itself_raises():
    case = double_case()
    q = case.q.requires_grad_()
    loss, *others = torch.ops.fastuft.mixed_info_nce(*problem(case, q, impl="torch"))
    assert not any(other.requires_grad for other in others)
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable only once"):
        gradient.sum().backward()


TRANSFORMS = {
    "grad": lambda f, q: torch.func.grad(f)(q),
    "vjp": lambda f, q: torch.func.vjp(f, q),
    "jvp": lambda f, q: torch.func.jvp(f, (q,), (q,)),
    "jacrev": lambda f, q: torch.func.jacrev(f)(q),
    "jacfwd": lambda f, q: torch.func.jacfwd(f)(q),
    "vmap": lambda f, q: torch.func.vmap(f)(torch.stack([q, q])),
}


@pytest.mark.parametrize("name", ["info_nce", "mixed_info_nce", "queue_lse", "terms"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_are_refused(transform, name):
    case = Case.random(4, 20, 8)
    with pytest.raises(RuntimeError, match=r"not with torch\.func's transforms.*Use fastuft\.loss\.reference"):
        TRANSFORMS[transform](lambda q: outputs(q, case, "torch")[name], case.q)


def test_forward_mode_is_refused():
    case = Case.random(4, 20, 8)
    with torch.autograd.forward_ad.dual_level():
        q = torch.autograd.forward_ad.make_dual(case.q, case.q)
        with pytest.raises(RuntimeError, match="forward-mode differentiation"):
            fastuft.info_nce(q, case.k_a, case.queue)


@pytest.mark.parametrize("path", PATHS)
def test_results_are_equal_without_gradients(path):
    device, impl = path
    case = Case.random(9, 70, 16, device=device)
    expected = outputs(case.q.clone().requires_grad_(), case, impl)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for q in (case.q, case.q.clone().requires_grad_()):
                for name, loss in outputs(q, case, impl).items():
                    assert not loss.requires_grad
                    torch.testing.assert_close(loss, expected[name].detach())
    assert not any(loss.requires_grad for loss in outputs(case.q, case, impl).values())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast_changes_nothing_inside(dtype, path):
    device, impl = path
    case = Case.random(9, 70, 16, device=device)
    encoder = nn.Linear(16, 16, device=device)
    with torch.autocast(device, dtype=dtype):
        q = encoder(case.q)
        assert q.dtype == dtype
        inside = fastuft.info_nce(q, case.k_a, case.queue, impl=impl)
    outside = fastuft.info_nce(q, case.k_a, case.queue, impl=impl)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)
    inside.backward()
    assert encoder.weight.grad.dtype == torch.float32 and encoder.weight.grad.any()


@pytest.mark.parametrize("path", PATHS)
def test_grad_scaler(path):
    device, impl = path
    case = Case.random(9, 70, 16, device=device)
    encoder = nn.Linear(16, 16, device=device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=65536.0)
    loss = fastuft.mixed_info_nce(encoder(case.q), case.k_a, case.k_b, case.lam, case.queue, impl=impl)
    (exact,) = torch.autograd.grad(loss, encoder.weight, retain_graph=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(encoder.weight.grad, exact)
    before = encoder.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(encoder.weight, before)


CALLS = [(2, True, True, "mean"), (1, False, True, "none"), (0, True, False, "sum")]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(("weights", "normalize", "need_grad", "reduction"), CALLS)
def test_opcheck_of_the_loss(weights, normalize, need_grad, reduction, dtype, path):
    """weights: 0 is Eq. 4, 1 one weight for all rows, 2 one per row."""
    device, impl = path
    case = Case.random(6, 40, 16, dtype, device=device)
    k_b, lam = (None, None) if weights == 0 else (case.k_b, case.lam if weights == 2 else case.lam[:1])
    q = case.q.requires_grad_(need_grad)
    arguments = problem(case, q, k_b=k_b, lam=lam, normalize=normalize, need_grad=need_grad, impl=impl)
    arguments = arguments._replace(reduction=reduction)
    library.opcheck(torch.ops.fastuft.mixed_info_nce.default, arguments)


@pytest.mark.parametrize("path", PATHS)
def test_opcheck_with_an_fp8_queue(path):
    device, impl = path
    case, queue = Case.random(6, 40, 16, device=device), fastuft.KeyQueue(40, 16, device=device, dtype=FP8)
    q = case.q.requires_grad_()
    arguments = problem(case, q, queue=queue.keys, queue_scales=queue.scales, impl=impl)
    library.opcheck(torch.ops.fastuft.mixed_info_nce.default, arguments)
    primitive = LseProblem(q, queue.keys, queue.scales, 0.2, "auto", True, impl)
    library.opcheck(torch.ops.fastuft.queue_lse.default, primitive)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("keys", [0, 40])
@pytest.mark.parametrize("need_mu", [True, False])
def test_opcheck_of_the_primitive(need_mu, keys, path):
    device, impl = path
    case = Case.random(6, keys, 16, device=device)
    arguments = LseProblem(case.q.requires_grad_(need_mu), case.queue, None, 0.2, "auto", need_mu, impl)
    library.opcheck(torch.ops.fastuft.queue_lse.default, arguments)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("upstream", [torch.tensor(0.25), torch.arange(6.0)], ids=["one", "rows"])
def test_opcheck_of_the_backward(upstream, path):
    device, _ = path
    arguments = (torch.randn(6, 16, device=device), upstream.to(device), 0.5, torch.bfloat16)
    library.opcheck(torch.ops.fastuft.scaled_gradient.default, arguments)
    expected = (arguments[0] * (0.5 * arguments[1].reshape(-1, 1))).bfloat16()
    torch.testing.assert_close(torch.ops.fastuft.scaled_gradient(*arguments), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch", [0, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=name_of)
def test_opcheck_of_the_enqueue(dtype, batch, path):
    device, _ = path
    queue = fastuft.KeyQueue(8, 16, device=device, dtype=dtype)
    arguments = (queue.keys, queue.scales, queue.pointer, torch.randn(batch, 16, device=device))
    library.opcheck(torch.ops.fastuft.enqueue_.default, arguments)


def compiled_agrees(device: str, impl: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
    case = Case.random(9, 70, 16, device=device)
    queue = fastuft.KeyQueue(70, 16, device=device, dtype=dtype)
    eager_queue = fastuft.KeyQueue(70, 16, device=device, dtype=dtype)
    eager_queue.load_state_dict(queue.state_dict())

    def step(q, k_a, k_b, lam, queue):
        keys = queue if dtype == FP8 else queue.keys
        loss, alignment, distribution = mixed_info_nce_with_terms(q, k_a, k_b, lam, keys, LossOptions(impl=impl))
        loss = loss + fastuft.info_nce(q, k_a, queue, impl=impl)
        loss = loss + fastuft.queue_lse(q, keys, impl=impl)[0].sum()
        queue.enqueue_(k_a)
        return loss, alignment + distribution

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for lam in (0.3, 0.4, 0.6, case.lam):  # a number that changes is not a new graph each time
        results = []
        for function, which in ((step, eager_queue), (compiled, queue)):
            q = case.q.detach().requires_grad_()
            loss, terms = function(q, case.k_a, case.k_b, lam, which)
            loss.backward()
            results.append((loss, terms, q.grad, which.rows(), which.pointer))
        for eager, found in zip(*results, strict=True):
            torch.testing.assert_close(found, eager)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(case.q, case.k_a, case.k_b, 0.5, queue), step(case.q, case.k_a, case.k_b, 0.5, eager_queue)
        )


@pytest.mark.parametrize("path", PATHS)
def test_compile_fullgraph(path):
    compiled_agrees(*path, "aot_eager")


@pytest.mark.parametrize("path", PATHS)
def test_compile_fullgraph_with_an_fp8_queue(path):
    compiled_agrees(*path, "aot_eager", FP8)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_compile_fullgraph_with_inductor(path):
    compiled_agrees(*path, "inductor")


def test_a_bad_weight_gives_nan_in_its_row_when_compiled():
    case = Case.random(4, 10, 16)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(lam):
        return fastuft.mixed_info_nce(case.q, case.k_a, case.k_b, lam, case.queue, reduction="none")

    assert loss(torch.tensor([0.5, 2.0, -1.0, torch.nan])).isnan().tolist() == [False, True, True, True]


def test_export():
    case = Case.random(4, 10, 16)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.queue = fastuft.KeyQueue(10, 16)
            self.loss = fastuft.InfoNCELoss()

        def forward(self, q, k):
            return self.loss(q, k, self.queue.keys)

    module = Loss()
    program = torch.export.export(module, (case.q, case.k_a))
    torch.testing.assert_close(program.module()(case.q, case.k_a), module(case.q, case.k_a))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_step_never_synchronizes(impl):
    case = Case.random(64, 4096, 128, device="cuda")
    queue = fastuft.KeyQueue(4096, 128, device="cuda")

    def step():
        q = case.q.detach().requires_grad_()
        loss, *_ = mixed_info_nce_with_terms(q, case.k_a, case.k_b, 0.5, queue.keys, LossOptions(impl=impl))
        loss.backward()
        fastuft.mixed_info_nce(q, case.k_a, case.k_b, case.lam, queue.keys, impl=impl).backward()
        fastuft.queue_lse(q, queue.keys, impl=impl)[0].sum().backward()
        queue.enqueue_(case.k_a)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
