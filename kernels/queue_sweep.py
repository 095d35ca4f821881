"""One sweep over a queue of keys gives the loss and its gradient; no logits are stored.

For a query h [D], z = h / |h|, queue rows x_j, c = log2(e) / tau, scores in log2 units s_j = c z.x_j:

    (1)  m = max_j s_j            (lazily: a reference within 8 of it, so that 2^(s - m) <= 256)
    (2)  l = sum_j 2^(s_j - m),   acc = sum_j 2^(s_j - m) x_j
    (3)  lse = ln(2) (m + log2 l),   mu = acc / l

Splits of the queue yield partial (m, l, acc), which combine in a fixed order:

    (4)  M = max_p m_p,   l = sum_p l_p 2^(m_p - M),   acc = sum_p acc_p 2^(m_p - M)

With a = z.k_a / tau, b = z.k_b / tau, s_a = sigmoid(lse - a), s_b = sigmoid(lse - b), w = lam s_a + (1 - lam) s_b:

    (5)  L = lam softplus(lse - a) + (1 - lam) softplus(lse - b)          Eq. 4 is lam = 1
    (6)  g = dL/dz = (w mu - lam s_a k_a - (1 - lam) s_b k_b) / tau
    (7)  dL/dh = (g - (g.z) z) / |h|                                      0 for rows shorter than 1e-12

Equals, for unit rows z and one positive::

    F.cross_entropy(torch.cat([(z * k).sum(1, keepdim=True), z @ queue.T], 1) / tau, torch.zeros(len(z)).long())

Arithmetic: tiles are multiplied in the promoted dtype of query and queue (fp32 exactly, never tf32; small problems always
in fp32) and accumulated in fp32. Two launches: sweep, then combine. Deterministic: no atomics.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuft.kernels.launch_plan import chip, plan_splits
from fastuft.kernels.launch_table import launch
from fastuft.kernels.problem import LseProblem, Problem, tile_precision
from fastuft.kernels.rows import load_rows, unit_rows

LOG2_E = math.log2(math.e)
MAX_WIDTH = 512
COMBINE_SPLITS = 16  # splits that a combine program reads at a time
COMBINE_WARPS = 2  # with 4 or 8 the compiler spills in some widths on sm_80 and sm_100
_INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def fold_tile(
    b_z,  # [BLOCK_B, BLOCK_D]
    b_x,  # [BLOCK_K, BLOCK_D]
    m_keys,  # [BLOCK_K], read where MASKED
    m,
    l,  # noqa: E741 (the formula's name)
    acc,
    scale,
    MASKED: tl.constexpr,
    NEED_MU: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """(m, l, acc) of (1), (2) with one more tile of keys."""
    dots = tl.dot(b_z, tl.trans(b_x), input_precision="ieee")
    if MASKED:
        dots = tl.where(m_keys[None, :], dots, -float("inf"))
    m_tile = tl.max(dots, 1) * scale
    if BRANCH:
        if tl.max(m_tile - m, 0) > 8.0:  # (1): rescale only when some row outgrows its reference
            m_new = tl.maximum(m, m_tile)
            correction = tl.exp2(m - m_new)
            m = m_new
            l *= correction  # noqa: E741
            if NEED_MU:
                acc *= correction[:, None]
    else:
        m_new = tl.where(m_tile - m > 8.0, m_tile, m)  # the same references, row by row
        correction = tl.exp2(m - m_new)
        m = m_new
        l *= correction  # noqa: E741
        if NEED_MU:
            acc *= correction[:, None]
    p = tl.exp2(dots * scale - m[:, None])  # scaled here: product and difference are one instruction
    l += tl.sum(p, 1)  # noqa: E741
    if NEED_MU:
        acc = tl.dot(p.to(b_x.dtype), b_x, acc, input_precision="ieee")
    return m, l, acc


@triton.jit
def sweep_kernel(
    q_ptr,  # [B, D]
    queue_ptr,  # [K, D]
    m_ptr,  # [S, B] fp32
    l_ptr,  # [S, B] fp32
    acc_ptr,  # [S, B, D] fp32
    q_stride,
    queue_stride,
    num_rows,
    num_keys,
    keys_per_split,
    width,
    scale,  # c
    NORMALIZE: tl.constexpr,
    NEED_MU: tl.constexpr,
    TILE_DTYPE: tl.constexpr,
    BRANCH: tl.constexpr,
    PEEL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(1), (2) of BLOCK_B rows over one split of the queue."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(1)
    columns = tl.arange(0, BLOCK_D)
    h = load_rows(q_ptr, q_stride, rows, columns, num_rows, width)
    if NORMALIZE:
        h, _ = unit_rows(h)
    b_z = h.to(TILE_DTYPE)
    m = tl.full([BLOCK_B], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_B], tl.float32)  # noqa: E741 (the formula's name)
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    first = split.to(tl.int64) * keys_per_split
    last = tl.minimum(first + keys_per_split, num_keys)
    tile = tl.arange(0, BLOCK_K)
    m_columns = columns[None, :] < width
    whole = first
    if PEEL:
        whole += (last - first) // BLOCK_K * BLOCK_K
        for start in range(first, whole, BLOCK_K):
            p_x = queue_ptr + (start + tile).to(tl.int64)[:, None] * queue_stride + columns[None, :]
            b_x = tl.load(p_x, m_columns, 0.0).to(TILE_DTYPE)
            m, l, acc = fold_tile(b_z, b_x, tile, m, l, acc, scale, False, NEED_MU, BRANCH)  # noqa: E741
    # Of a peeled loop at most one tile is left: with one stage it takes no registers for copies ahead.
    for start in tl.range(whole, last, BLOCK_K, num_stages=1 if PEEL else None):
        m_keys = start + tile < last
        p_x = queue_ptr + (start + tile).to(tl.int64)[:, None] * queue_stride + columns[None, :]
        b_x = tl.load(p_x, m_keys[:, None] & m_columns, 0.0).to(TILE_DTYPE)
        m, l, acc = fold_tile(b_z, b_x, m_keys, m, l, acc, scale, True, NEED_MU, BRANCH)  # noqa: E741
    inside = rows < num_rows
    out = split.to(tl.int64) * num_rows + rows
    tl.store(m_ptr + out, m, inside)
    tl.store(l_ptr + out, l, inside)
    if NEED_MU:
        m_out = inside[:, None] & (columns[None, :] < width)
        tl.store(acc_ptr + out[:, None] * width + columns[None, :], acc, m_out)


@triton.jit
def combine_kernel(
    m_ptr,  # [S, B] fp32
    l_ptr,  # [S, B] fp32
    acc_ptr,  # [S, B, D] fp32
    q_ptr,  # [B, D]
    k_a_ptr,  # [B, D]
    k_b_ptr,  # [B, D]
    lam_ptr,  # [B] or [1] fp32
    loss_ptr,  # [B] fp32
    grad_ptr,  # [B, D] fp32: the gradient, or mu without HAS_LOSS
    lse_ptr,  # [B] fp32: the alignment with HAS_LOSS
    q_stride,
    k_a_stride,
    k_b_stride,
    lam_stride,
    num_rows,
    num_splits,
    width,
    inverse_tau,
    HAS_LOSS: tl.constexpr,
    TWO_KEYS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NEED_MU: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(3) to (7) of one row, over its splits in order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < width
    top = -float("inf")
    for start in range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        m = tl.load(m_ptr + splits.to(tl.int64) * num_rows + row, splits < num_splits, -float("inf"))
        top = tl.maximum(top, tl.max(m, 0))
    reference = tl.where(top == -float("inf"), 0.0, top)
    total = 0.0
    mu = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        m_splits = splits < num_splits
        place = splits.to(tl.int64) * num_rows + row
        weight = tl.exp2(tl.load(m_ptr + place, m_splits, -float("inf")) - reference)  # (4)
        total += tl.sum(weight * tl.load(l_ptr + place, m_splits, 0.0), 0)
        if NEED_MU:
            m_acc = m_splits[:, None] & inside[None, :]
            part = tl.load(acc_ptr + place[:, None] * width + columns[None, :], m_acc, 0.0)
            mu += tl.sum(weight[:, None] * part, 0)
    empty = total == 0.0  # K = 0; NaN where a query is, whose maxima are -inf too
    lse = tl.where(empty, -float("inf"), (reference + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)  # (3)
    mu = mu / tl.where(empty, 1.0, total)
    if HAS_LOSS:
        one = row + tl.arange(0, 1)
        h = load_rows(q_ptr, q_stride, one, columns, num_rows, width)
        key = load_rows(k_a_ptr, k_a_stride, one, columns, num_rows, width)
        inverse_norm = tl.full([1], 1.0, tl.float32)
        z = h
        if NORMALIZE:
            z, inverse_norm = unit_rows(h)
            key, _ = unit_rows(key)
        a = tl.sum(z * key, 1) * inverse_tau
        lam = tl.full([1], 1.0, tl.float32)
        if TWO_KEYS:
            lam = tl.load(lam_ptr + one * lam_stride).to(tl.float32)
            lam = tl.where((lam >= 0.0) & (lam <= 1.0), lam, float("nan"))
        over_a = lse - a
        # softplus(x) = max(x, 0) + log(1 + e^-|x|)
        loss = lam * (tl.maximum(over_a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(over_a))))  # (5)
        pull_a = lam * tl.sigmoid(over_a)
        weight_mu = pull_a
        pulled = pull_a[:, None] * key
        alignment = -lam * a
        if TWO_KEYS:
            other = load_rows(k_b_ptr, k_b_stride, one, columns, num_rows, width)
            if NORMALIZE:
                other, _ = unit_rows(other)
            b = tl.sum(z * other, 1) * inverse_tau
            alignment -= (1.0 - lam) * b
            over_b = lse - b
            loss += (1.0 - lam) * (tl.maximum(over_b, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(over_b))))
            pull_b = (1.0 - lam) * tl.sigmoid(over_b)
            weight_mu += pull_b
            pulled += pull_b[:, None] * other
        tl.store(loss_ptr + one, loss)
        tl.store(lse_ptr + one, alignment)
        if NEED_MU:
            g = (weight_mu[:, None] * mu[None, :] - pulled) * inverse_tau  # (6)
            if NORMALIZE:
                g = (g - tl.sum(g * z, 1)[:, None] * z) * inverse_norm[:, None]  # (7)
            tl.store(grad_ptr + one[:, None] * width + columns[None, :], g, inside[None, :])
    else:
        tl.store(lse_ptr + row, lse)
        if NEED_MU:
            tl.store(grad_ptr + row * width + columns, mu, inside)


def unsupported(q: Tensor, queue: Tensor) -> str | None:
    """Why these tensors cannot go through the kernels; None when they can."""
    if not (q.is_cuda or _INTERPRETED):
        return f"the query is on {q.device}, and the fused kernels need a CUDA device"
    if torch.float64 in (q.dtype, queue.dtype):
        return "float64 has no fused kernel"
    if q.shape[1] > MAX_WIDTH:
        return f"D={q.shape[1]} is above {MAX_WIDTH}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 8:
        return "the fused kernels need compute capability 8.0 or newer"
    return None


def _rows(value: Tensor) -> Tensor:
    """The tensor with consecutive elements within a row."""
    return value if value.stride(1) == 1 or value.shape[1] == 1 else value.contiguous()


def _triton_dtype(precision: str) -> tl.dtype:
    # The interpreter multiplies bf16 tiles wrongly; there they are widened first.
    if precision in ("ieee", "tf32") or (_INTERPRETED and precision == "bf16"):
        return tl.float32
    return {"fp16": tl.float16, "bf16": tl.bfloat16}[precision]


def _run(problem: Problem, has_loss: bool, splits: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient or mu, alignment or lse); the first is empty without a loss."""
    q, queue = _rows(problem.q), _rows(problem.queue)
    (num_rows, width), num_keys = q.shape, queue.shape[0]
    block_d = max(16, triton.next_power_of_2(width))
    precision = tile_precision(problem.precision, q.dtype, queue.dtype)
    arch, multiprocessors = chip(q.device)
    config = launch(arch, 4 if precision in ("ieee", "tf32") else 2, block_d, num_rows)
    num_splits, keys_per_split = plan_splits(num_rows, num_keys, width, config, multiprocessors)
    if splits is not None:
        keys_per_split = max(1, triton.cdiv(num_keys, splits))
        num_splits = max(1, triton.cdiv(num_keys, keys_per_split))

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    need_mu = problem.need_grad
    m, total = new(num_splits, num_rows), new(num_splits, num_rows)
    acc = new(num_splits, num_rows, width) if need_mu else m
    grad = new(num_rows, width if need_mu else 0)
    loss, lse = new(num_rows if has_loss else 0), new(num_rows)
    k_a = _rows(problem.k_a)
    k_b = k_a if problem.k_b is None else _rows(problem.k_b)
    weights = lse if problem.lam is None else problem.lam
    lam_stride = weights.stride(0) if weights.numel() > 1 else 0
    sweep_kernel[(triton.cdiv(num_rows, config.block_b), num_splits)](
        q, queue, m, total, acc, q.stride(0), queue.stride(0), num_rows, num_keys, keys_per_split, width,
        LOG2_E / problem.temperature, problem.normalize, need_mu, _triton_dtype(precision), config.branch, config.peel,
        config.block_b, config.block_k, block_d, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    combine_kernel[(num_rows,)](
        m, total, acc, q, k_a, k_b, weights, loss, grad, lse, q.stride(0), k_a.stride(0), k_b.stride(0), lam_stride,
        num_rows, num_splits, width, 1 / problem.temperature, has_loss, problem.lam is not None, problem.normalize,
        need_mu, COMBINE_SPLITS, block_d, num_warps=COMBINE_WARPS,
    )  # fmt: skip
    return loss, grad, lse


def queue_lse(problem: LseProblem, *, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """(lse [B], mu [B, D] or [B, 0]) in fp32; ``splits`` of the queue overrides the plan."""
    z, queue, temperature, precision, need_mu, impl = problem
    loss = Problem(z, z, None, None, queue, temperature, False, False, precision, "none", need_mu, impl)
    with torch.cuda.device_of(z):
        _, mu, lse = _run(loss, False, splits)
    return lse, mu


def mixed_info_nce(problem: Problem, *, splits: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [B], dloss/dq [B, D] or [B, 0], alignment [B]) of each sample in fp32; ``splits`` overrides the plan."""
    with torch.cuda.device_of(problem.q):
        return _run(problem, True, splits)
