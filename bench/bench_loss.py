"""The queue loss, forward and backward, beside every other way to compute the identical loss.

Claim: one sweep that stores no logits beats MoCo's expression, with under 10 MB instead of more than 200, and most of its
time goes into the two products. On one CPU thread of an AMD EPYC with AVX-512 (family 25, model 17), the products alone take
89% of its processor time, MoCo's expression 1.45 times and scaled-dot-product attention used as a log-sum-exp 0.97 to 1.05
times as much, depending on how that splits its queue; on an Intel Xeon at 2.5 GHz, MoCo's expression took twice as much. The
target on an H200 is ten times the speed of eager fp32. Half precision on a CPU is computed in fp32, which is exact: on that
EPYC, which has bf16 instructions, expressions in bf16, with rounded logits, take two thirds of the time.

Rows of Eq. 4 (one positive): ours; facebookresearch/moco's expression with and without its clone of the queue; the
textbook expression, eager and compiled; an online softmax over chunks, eager and compiled; attention with V = K, whose
operator returns the log-sum-exp, with the queue split by hand; lightly's memory bank if installed; any
``--impl MODULE:FUNCTION``. Rows of Eq. 6 (two positives): ours; two concatenations; one log-sum-exp for both.
pytorch-metric-learning's NTXent is left out, because its [B, B K] matrix would take 17 GB here.

Each row is first checked against float64. The counts are two products of [B, D] with the queue, and one read of the queue.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import measure, peak_extra_bytes, peer
from torch import Tensor
from torch.nn import functional as F

import fastuft
from fastuft.loss import portable, reference

TEMPERATURE, LAM = 0.2, 0.3
CHUNK = 1024
SIZES = {"smoke": [(32, 2048, 64)], "cpu": [(256, 65536, 128)], "cuda": [(256, 65536, 128), (4096, 65536, 128)]}
DTYPES = {"smoke": ["float32"], "cpu": ["float32", "bfloat16"], "cuda": ["bfloat16", "float32"]}
CLAIM_SIZE = (256, 65536, 128)
# Ratios of processor time, well below what was measured.
LEAST_OVER = {"moco": 1.2, "attention": 0.9, "products": 0.6}
MOST_EXTRA_BYTES = 10e6

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q, k, queue) -> mean loss


def pytest_generate_tests(metafunc):
    if "problem" in metafunc.fixturenames:
        options = metafunc.config.option
        scale = "smoke" if options.smoke else "cuda" if use_cuda(options.device) else "cpu"
        found = [(size, dtype) for dtype in DTYPES[scale] for size in SIZES[scale]]
        names = [f"B{size[0]}-{dtype}" for size, dtype in found]
        # `make bench` leaves half precision out on a CPU: there it is emulated, and slower than float32.
        late = {"marks": pytest.mark.slow} if scale == "cpu" else {}
        problems = [pytest.param(key, **(late if key[1] == "bfloat16" else {})) for key in found]
        metafunc.parametrize("problem", problems, ids=names, indirect=True, scope="module")


def use_cuda(choice: str) -> bool:
    return choice == "cuda" or (choice == "auto" and torch.cuda.is_available())


@dataclass(frozen=True)
class Problem:
    """One size, with a checked example and its float64 truth."""

    batch: int
    keys: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k, queue); q takes a gradient, the others have unit rows."""
        q, k = (torch.randn(self.batch, self.width, device=self.device, dtype=self.dtype) for _ in range(2))
        queue = torch.randn(self.keys, self.width, device=self.device, dtype=self.dtype)
        return q.requires_grad_(), F.normalize(k, dim=1), F.normalize(queue, dim=1)

    @functools.cached_property
    def example(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inputs()

    @functools.cached_property
    def truths(self) -> dict[bool, tuple[Tensor, Tensor]]:
        """(loss, gradient) of the example in float64, by whether there are two positives."""
        q, k, queue = (t.detach().double() for t in self.example)
        q.requires_grad_()
        found = {}
        for mixed in (False, True):
            loss = (
                reference.mixed_info_nce(q, k, k.flip(0), LAM, queue, TEMPERATURE)
                if mixed
                else reference.info_nce(q, k, queue, TEMPERATURE)
            ).mean()
            found[mixed] = (loss.detach(), torch.autograd.grad(loss, q)[0])
        return found

    def recorded(self, equation: int, ceilings: Any, suffix: str = "") -> dict[str, Any]:
        """What every row of a size is measured with."""
        sizes = f"B={self.batch}, K={self.keys}, D={self.width}, {str(self.dtype).removeprefix('torch.')}"
        return {
            "group": f"Eq. {equation}, {sizes}{suffix}",
            "device": self.device,
            "ceilings": ceilings,
            "bytes_moved": self.dtype.itemsize * self.keys * self.width + 4 * self.batch * self.width,
            "flops": 4.0 * self.batch * self.keys * self.width,
            "dtype": self.dtype,
        }

    def check(self, step: Callable[..., tuple[Tensor, Tensor]], mixed: bool, inputs: tuple[Tensor, ...]) -> None:
        tolerance = 1e-5 if self.dtype == torch.float32 else 3e-2
        for found, exact in zip(step(*inputs), self.truths[mixed], strict=True):
            error = (found.detach().double() - exact).abs().max() / exact.abs().max()
            assert error < tolerance, f"error {error:.3g}: this is another loss"


@pytest.fixture(scope="module")
def problem(request) -> Problem:
    size, dtype = request.param
    device = torch.device("cuda" if use_cuda(request.config.option.device) else "cpu")
    torch.manual_seed(0)
    return Problem(*size, getattr(torch, dtype), device)


def with_backward(loss: Loss) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(q: Tensor, k: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(q, k, queue)
        return value, torch.autograd.grad(value, q)[0]

    return step


def run(
    benchmark,
    problem: Problem,
    loss: Loss,
    ceilings,
    *,
    mixed: bool = False,
    baseline: bool = False,
    queue_layout: Callable[[Tensor], Tensor] = lambda queue: queue,
    before_check: Callable[[Tensor], None] = lambda queue: None,
    graph: bool = True,
    warm: bool = False,
) -> None:
    """Check one row against float64, then time it.

    ``queue_layout`` is how the row wants to be given the queue. ``warm``: one set of inputs, which stays in the cache.
    """
    step = with_backward(loss)

    def arranged(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, queue = inputs
        return q, k, queue_layout(queue)

    before_check(problem.example[2])
    problem.check(step, mixed, arranged(problem.example))
    measure(
        benchmark,
        step,
        lambda: arranged(problem.inputs()),
        baseline=baseline,
        graph=graph,
        cold=False if warm else None,
        **problem.recorded(6 if mixed else 4, ceilings, ", warm L2" if warm else ""),
    )


# --- the expressions ---


def ours(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    return fastuft.info_nce(q, k, queue, TEMPERATURE)


def moco(q: Tensor, k: Tensor, queue: Tensor, clone: bool = True) -> Tensor:
    """facebookresearch/moco: builder and cross-entropy; its queue is [D, K]."""
    q = F.normalize(q, dim=1)
    positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", [q, queue.clone().detach() if clone else queue])
    logits = torch.cat([positive, negative], dim=1)
    logits /= TEMPERATURE
    labels = torch.zeros(logits.shape[0], dtype=torch.long, device=q.device)
    return F.cross_entropy(logits, labels)


def textbook(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    return reference.info_nce(q, k, queue, TEMPERATURE).mean()


def from_sweep(q: Tensor, k: Tensor, queue: Tensor, sweep: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """The loss from a sweep's constant (lse, mu): z.mu / tau, whose gradient is that of lse, carries the gradient."""
    z = F.normalize(q.float(), dim=1)
    lse, mu = sweep(z.detach(), queue)
    score = (z * mu).sum(1) / TEMPERATURE
    a = (z * k).sum(1) / TEMPERATURE
    return F.softplus(lse + score - score.detach() - a).mean()


def online_softmax(z: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """(lse, mu) over chunks of the queue in plain PyTorch."""
    z = (z / TEMPERATURE).to(queue.dtype)
    top = torch.full((len(z), 1), -torch.inf, device=z.device)
    total = torch.zeros(len(z), 1, device=z.device)
    weighted = torch.zeros(z.shape, device=z.device)
    for keys in queue.split(CHUNK):
        scores = (z @ keys.T).float()
        grown = torch.maximum(top, scores.amax(1, keepdim=True))
        weights, shrink = torch.exp(scores - grown), torch.exp(top - grown)
        total = total * shrink + weights.sum(1, keepdim=True)
        weighted = weighted * shrink + (weights.to(queue.dtype) @ keys).float()
        top = grown
    return (top + total.log()).squeeze(1), weighted / total


def attention(z: Tensor, queue: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """(lse, mu) by the attention operators with V = K, over ``splits`` parts of the queue as heads."""
    query = z.to(queue.dtype).expand(1, splits, *z.shape)
    keys = queue.view(1, splits, -1, queue.shape[1])
    scale = 1 / TEMPERATURE
    if z.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, keys, scale=scale)
    elif queue.dtype == torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, keys, keys, None, True, scale=scale
        )
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, keys, keys, scale=scale)
    lse = lse.view(splits, -1)[:, : len(z)]
    share = lse.softmax(0)[..., None]
    return lse.logsumexp(0), (share * out[0].float()).sum(0)


def mixed_ours(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    return fastuft.mixed_info_nce(q, k, k.flip(0), LAM, queue, TEMPERATURE)


def mixed_by_concatenation(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """Two rows of logits that share their negatives, and two cross-entropies."""
    z = F.normalize(q, dim=1)
    negative = z @ queue.T
    labels = torch.zeros(len(q), dtype=torch.long, device=q.device)
    to_a, to_b = (
        F.cross_entropy(torch.cat([(z * key).sum(1, keepdim=True), negative], 1) / TEMPERATURE, labels)
        for key in (k, k.flip(0))
    )
    return LAM * to_a + (1 - LAM) * to_b


def mixed_by_logaddexp(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """One log-sum-exp over the negatives for both positives."""
    z = F.normalize(q, dim=1)
    lse = (z @ queue.T / TEMPERATURE).logsumexp(1)
    a, b = ((z * key).sum(1) / TEMPERATURE for key in (k, k.flip(0)))
    return (LAM * (torch.logaddexp(a, lse) - a) + (1 - LAM) * (torch.logaddexp(b, lse) - b)).mean()


def products(z: Tensor, queue: Tensor) -> Tensor:
    """The two products of the loss and its gradient alone, over chunks of the queue as a sweep has them."""
    weighted = torch.zeros_like(z)
    for keys in queue.split(CHUNK if z.device.type == "cpu" else len(queue)):
        weighted.addmm_(z @ keys.T, keys)
    return weighted


# --- one positive ---


def test_info_nce(benchmark, problem, ceilings):
    run(benchmark, problem, ours, ceilings)


@pytest.mark.parametrize("equation", [4, 6])
def test_products_alone(benchmark, problem, ceilings, equation):
    z, _, queue = (t.detach() for t in problem.example)
    expected = (z.double() @ queue.double().T) @ queue.double()
    error = (products(z, queue) - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if problem.dtype == torch.float32 else 3e-2)
    measure(
        benchmark,
        lambda q, k, queue: products(q.detach(), queue),
        problem.inputs,
        limit=True,
        **problem.recorded(equation, ceilings),
    )


def test_moco(benchmark, problem, ceilings):
    run(benchmark, problem, moco, ceilings, baseline=True, queue_layout=lambda queue: queue.T.contiguous())


def test_moco_without_clone(benchmark, problem, ceilings):
    loss = functools.partial(moco, clone=False)
    run(benchmark, problem, loss, ceilings, queue_layout=lambda queue: queue.T.contiguous())


def test_textbook(benchmark, problem, ceilings):
    run(benchmark, problem, textbook, ceilings)


def test_textbook_compiled(benchmark, problem, ceilings):
    torch.compiler.reset()
    run(benchmark, problem, torch.compile(textbook), ceilings)


def test_chunked(benchmark, problem, ceilings):
    run(benchmark, problem, functools.partial(from_sweep, sweep=online_softmax), ceilings)


def test_chunked_compiled(benchmark, problem, ceilings):
    torch.compiler.reset()
    # The step of one chunk is compiled, not the loop, which would be unrolled into one graph a queue size.
    run(benchmark, problem, functools.partial(from_sweep, sweep=compiled_online_softmax()), ceilings)


def compiled_online_softmax() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    @torch.compile
    def fold(z: Tensor, keys: Tensor, top: Tensor, total: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = (z @ keys.T).float()
        grown = torch.maximum(top, scores.amax(1, keepdim=True))
        weights, shrink = torch.exp(scores - grown), torch.exp(top - grown)
        total = total * shrink + weights.sum(1, keepdim=True)
        return grown, total, weighted * shrink + (weights.to(keys.dtype) @ keys).float()

    def sweep(z: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        z = (z / TEMPERATURE).to(queue.dtype)
        top = torch.full((len(z), 1), -torch.inf, device=z.device)
        total, weighted = torch.zeros(len(z), 1, device=z.device), torch.zeros(z.shape, device=z.device)
        for keys in queue.split(CHUNK):
            top, total, weighted = fold(z, keys, top, total, weighted)
        return (top + total.log()).squeeze(1), weighted / total

    return sweep


@pytest.mark.parametrize("splits", [1, 16, 64])
def test_attention(benchmark, problem, ceilings, splits):
    run(benchmark, problem, functools.partial(from_sweep, sweep=functools.partial(attention, splits=splits)), ceilings)


def test_lightly(benchmark, problem, ceilings):
    if problem.dtype != torch.float32:
        pytest.skip("lightly's bank is fp32")
    loss = peer("lightly.loss", "lightly").NTXentLoss(TEMPERATURE, memory_bank_size=(problem.keys, problem.width))
    loss = loss.to(problem.device)

    def fill(queue: Tensor) -> None:
        loss.memory_bank.bank.copy_(queue)

    # Its bank reads its pointer on the host, which a CUDA graph cannot hold.
    run(benchmark, problem, lambda q, k, _: loss(q, k), ceilings, before_check=fill, graph=False)


def test_user_implementation(benchmark, problem, ceilings, user_impl):
    run(benchmark, problem, lambda q, k, queue: user_impl(q, k, queue, TEMPERATURE), ceilings)


WARM_ROWS: dict[str, Loss] = {
    "info_nce": ours,
    "moco": moco,
    "textbook": textbook,
    "attention": functools.partial(from_sweep, sweep=functools.partial(attention, splits=16)),
}


@pytest.mark.parametrize("row", WARM_ROWS)
def test_warm(benchmark, problem, ceilings, row):
    """A queue that the L2 cache holds already, as after the step that wrote it when little else ran between."""
    if problem.device.type != "cuda":
        pytest.skip("a row of --device cuda: on a CPU every row takes turns over few inputs")
    moves = {"queue_layout": lambda queue: queue.T.contiguous()} if row == "moco" else {}
    run(benchmark, problem, WARM_ROWS[row], ceilings, baseline=row == "moco", warm=True, **moves)


# --- two positives ---


def test_mixed_info_nce(benchmark, problem, ceilings):
    run(benchmark, problem, mixed_ours, ceilings, mixed=True)


def test_mixed_concatenation(benchmark, problem, ceilings):
    run(benchmark, problem, mixed_by_concatenation, ceilings, mixed=True, baseline=True)


def test_mixed_logaddexp(benchmark, problem, ceilings):
    run(benchmark, problem, mixed_by_logaddexp, ceilings, mixed=True)


# --- host time, and the claims ---


@pytest.mark.parametrize("what", ["forward", "forward_and_backward", "allocations"])
def test_host_time(benchmark, device, monkeypatch, what):
    """Checks, dispatch and autograd of 100 calls: the sweep itself is replaced by the allocation of its outputs."""
    batch, width, calls = 256, 128, 100
    q = torch.randn(batch, width, device=device, requires_grad=True)
    k, queue = torch.randn(batch, width, device=device), torch.randn(64, width, device=device)
    upstream = torch.ones(batch, device=device)

    def allocate(*_: object) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, device=device) for shape in ((batch,), (batch, width), (batch,)))

    if device.type == "cuda":
        from fastuft.kernels import queue_sweep

        monkeypatch.setattr(queue_sweep, "mixed_info_nce", allocate)
    else:
        monkeypatch.setattr(portable, "mixed_info_nce", allocate)

    def call() -> None:
        for _ in range(calls):
            if what == "allocations":
                allocate()
                continue
            loss = fastuft.info_nce(q, k, queue, TEMPERATURE, reduction="none")
            if what == "forward_and_backward":
                torch.autograd.grad(loss, q, upstream)

    group = f"host time of {calls} calls"
    wall = device.type == "cuda"  # whose driver has threads of its own
    measure(
        benchmark, call, group=group, baseline=what == "allocations", device="cpu", memory=False, items=calls, wall=wall
    )


@pytest.mark.parametrize("what", ["forward", "forward_and_backward"])
def test_host_time_with_launches(benchmark, device, what):
    """100 whole eager calls on a GPU, enqueued and not waited for: with allocations and both launches."""
    if device.type != "cuda":
        pytest.skip("a row of --device cuda: a CPU computes during the call")
    batch, width, calls = 256, 128, 100
    q = torch.randn(batch, width, device=device, requires_grad=True)
    k, queue = torch.randn(batch, width, device=device), torch.randn(64, width, device=device)
    upstream = torch.ones(batch, device=device)

    def call() -> None:
        for _ in range(calls):
            loss = fastuft.info_nce(q, k, queue, TEMPERATURE, reduction="none", impl="triton")
            if what == "forward_and_backward":
                torch.autograd.grad(loss, q, upstream)

    call()  # compiles
    torch.cuda.synchronize(device)
    # So few keys that the device keeps up: a full launch queue would make the host wait.
    group = f"host time of {calls} calls"
    measure(benchmark, call, group=group, device="cpu", memory=False, items=calls, wall=True)


@pytest.mark.parametrize("rival", LEAST_OVER)
def test_claims_on_a_cpu(benchmark, device, rival):
    """Ratios of processor time (other load matters less to it) in alternating rounds at the paper's size; memory."""
    if device.type != "cpu":
        pytest.skip("a claim of --device cpu")
    problem = Problem(*CLAIM_SIZE, torch.float32, torch.device("cpu"))
    q, k, queue = problem.inputs()
    transposed = queue.T.contiguous()
    rivals = {
        "moco": lambda: with_backward(moco)(q, k, transposed),
        "attention": lambda: with_backward(functools.partial(from_sweep, sweep=functools.partial(attention, splits=1)))(
            q, k, queue
        ),
        "products": lambda: products(q.detach(), queue),
    }

    def our_step() -> object:
        return with_backward(ours)(q, k, queue)

    times: dict[Callable[[], object], list[float]] = {our_step: [], rivals[rival]: []}
    for turn in range(10):
        for step, own in times.items():
            begin = time.process_time()
            step()
            if turn:  # the first is the warm-up
                own.append(time.process_time() - begin)
    ratio = statistics.median(times[rivals[rival]]) / statistics.median(times[our_step])
    peak = peak_extra_bytes(our_step)
    benchmark.extra_info.update(ratio=ratio, extra_bytes=peak)
    measure(benchmark, our_step, group=f"time of {rival} over ours: {ratio:.2f}", device="cpu", rounds=3)
    assert peak <= MOST_EXTRA_BYTES
    assert ratio >= LEAST_OVER[rival]
