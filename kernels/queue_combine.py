"""After the sweep: combines partial results into loss and gradient, and scales that gradient in the backward pass.

Steps (3) to (7) are those of ``queue_sweep``. Backward, for the upstream gradient u of the loss and factor f (1/B of a mean):

    dL/dq = (f u) dL/dh, computed in fp32 and cast last

The mean of the losses is a separate launch (torch's). In combine it would take the last program to end, which would have
to see what all others wrote: that order is not Triton's to promise, and no interpreter shows where it is broken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuft.kernels.launch_plan import Plan, chip
from fastuft.kernels.problem import Problem
from fastuft.kernels.rows import load_rows, unit_rows

COMBINE_SLOTS = 8  # partial results that a combine program reads at a time
COMBINE_WARPS = 2  # with 4 or 8, the compiler spills at some widths on sm_80 and sm_100
SCALE_BLOCK = 1024


@dataclass(frozen=True)
class Partials:
    """The partial results of a sweep, by slot and row of the slot's tile.

    Args:
        m: [slots, rows] fp32, read unless ``unit``. total: l of (2), likewise. acc: [slots, rows, D] fp32.
        unit: (1) took the constant ``scale``.
        block_b: rows of a tile.
        plan: how units were shared out.
    """

    m: Tensor
    total: Tensor
    acc: Tensor
    unit: bool
    scale: float
    block_b: int
    plan: Plan


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + e^-|x|)"""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def combine_kernel(
    m_ptr,  # [slots, slot_rows] fp32, unless UNIT
    l_ptr,  # [slots, slot_rows] fp32
    acc_ptr,  # [slots, slot_rows, D] fp32
    q_ptr,  # [B, D]
    k_a_ptr,  # [B, D]
    k_b_ptr,  # [B, D]
    lam_ptr,  # [B] or [1]
    loss_ptr,  # [B] fp32
    grad_ptr,  # [B, D] fp32: the gradient, or mu without HAS_LOSS
    row_ptr,  # [B] fp32: the alignment, or lse without HAS_LOSS
    q_stride,
    k_a_stride,
    k_b_stride,
    lam_stride,
    num_rows,
    key_tiles,
    units_per_program,
    slot_rows,
    width,
    scale,  # c
    inverse_tau,
    PDL: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    TWO_KEYS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NEED_MU: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(3) to (7) for one row, over its slots in order."""
    if PDL:
        tl.extra.cuda.gdc_wait()  # wait for the end of the sweep; nothing is read before it
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < width
    tile = row // BLOCK_B
    first = tile + tile * key_tiles // units_per_program
    last = tile + ((tile + 1) * key_tiles - 1) // units_per_program
    top = scale
    if not UNIT:
        top = -float("inf")
        for start in range(first, last + 1, BLOCK_S):
            slots = start + tl.arange(0, BLOCK_S)
            m = tl.load(m_ptr + slots * slot_rows + row % BLOCK_B, slots <= last, -float("inf"))
            top = tl.maximum(top, tl.max(m, 0))
    reference = tl.where(top == -float("inf"), 0.0, top)
    total = 0.0
    mu = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, last + 1, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        m_slots = slots <= last
        position = slots * slot_rows + row % BLOCK_B
        weight = m_slots.to(tl.float32)
        if not UNIT:
            weight = tl.exp2(tl.load(m_ptr + position, m_slots, -float("inf")) - reference)  # (4)
        total += tl.sum(weight * tl.load(l_ptr + position, m_slots, 0.0), 0)
        if NEED_MU:
            m_acc = m_slots[:, None] & inside[None, :]
            part = tl.load(acc_ptr + position[:, None] * width + columns[None, :], m_acc, 0.0)
            mu += tl.sum(weight[:, None] * part, 0)
    empty = total == 0.0  # K = 0; a NaN query has a NaN total, though its maxima are -inf too
    lse = tl.where(empty, -float("inf"), (reference + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)  # (3)
    mu = mu / tl.where(empty, 1.0, total)
    if HAS_LOSS:
        one = row + tl.arange(0, 1)
        z = load_rows(q_ptr, q_stride, one, columns, num_rows, width)
        key = load_rows(k_a_ptr, k_a_stride, one, columns, num_rows, width)
        inverse_norm = tl.full([1], 1.0, tl.float32)
        if NORMALIZE:
            z, inverse_norm = unit_rows(z)
            key, _ = unit_rows(key)
        a = tl.sum(z * key, 1) * inverse_tau
        lam = tl.full([1], 1.0, tl.float32)
        if TWO_KEYS:
            lam = tl.load(lam_ptr + one * lam_stride).to(tl.float32)
            lam = tl.where((lam >= 0.0) & (lam <= 1.0), lam, float("nan"))
        loss = lam * softplus(lse - a)  # (5)
        alignment = -lam * a
        weight_mu = lam * tl.sigmoid(lse - a)
        pulled = weight_mu[:, None] * key
        if TWO_KEYS:
            key = load_rows(k_b_ptr, k_b_stride, one, columns, num_rows, width)
            if NORMALIZE:
                key, _ = unit_rows(key)
            b = tl.sum(z * key, 1) * inverse_tau
            loss += (1.0 - lam) * softplus(lse - b)
            alignment -= (1.0 - lam) * b
            pull = (1.0 - lam) * tl.sigmoid(lse - b)
            weight_mu += pull
            pulled += pull[:, None] * key
        tl.store(loss_ptr + one, loss)
        tl.store(row_ptr + one, alignment)
        if NEED_MU:
            g = (weight_mu[:, None] * mu[None, :] - pulled) * inverse_tau  # (6)
            if NORMALIZE:
                g = (g - tl.sum(g * z, 1)[:, None] * z) * inverse_norm[:, None]  # (7)
            tl.store(grad_ptr + one[:, None] * width + columns[None, :], g, inside[None, :])
    else:
        tl.store(row_ptr + row, lse)
        if NEED_MU:
            tl.store(grad_ptr + row * width + columns, mu, inside)


@triton.jit
def scale_kernel(grad_ptr, upstream_ptr, out_ptr, upstream_stride, numel, width, factor, BLOCK: tl.constexpr):
    """BLOCK elements of dL/dq."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < numel
    upstream = tl.load(upstream_ptr + element // width * upstream_stride, inside, 0.0).to(tl.float32)
    scaled = tl.load(grad_ptr + element, inside, 0.0) * (upstream * factor)
    tl.store(out_ptr + element, scaled.to(out_ptr.dtype.element_ty), inside)


def dependent_launches(device: torch.device) -> bool:
    """Whether combine is launched while the sweep runs (programmatic dependent launch, from sm_90), to start as it ends."""
    return device.type == "cuda" and chip(device)[0] >= 90


def combine(problem: Problem, partials: Partials, has_loss: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [B], gradient [B, D], alignment [B]), or without a loss (empty, mu [B, D], lse [B]); [B, 0] if not needed."""
    q, k_a, k_b, lam = problem[:4]
    num_rows, width = q.shape

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    loss, grad, row = new(num_rows if has_loss else 0), new(num_rows, width if problem.need_grad else 0), new(num_rows)
    weights = row if lam is None else lam
    lam_stride = weights.stride(0) if weights.numel() > 1 else 0
    k_b = k_a if k_b is None else k_b
    pdl = dependent_launches(q.device)
    options = {"launch_pdl": True} if pdl else {}
    combine_kernel[(num_rows,)](
        partials.m, partials.total, partials.acc, q, k_a, k_b, weights, loss, grad, row, q.stride(0), k_a.stride(0),
        k_b.stride(0), lam_stride, num_rows, partials.plan.key_tiles, partials.plan.units_per_program,
        partials.total.shape[1], width, partials.scale, 1 / problem.temperature, pdl, partials.unit, has_loss,
        lam is not None, problem.normalize, problem.need_grad, partials.block_b, COMBINE_SLOTS,
        max(16, triton.next_power_of_2(width)), num_warps=COMBINE_WARPS, **options,
    )  # fmt: skip
    return loss, grad, row


def scaled_gradient(gradient: Tensor, upstream: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """gradient [B, D] fp32 * factor * upstream ([B], or one value for all rows), cast to dtype last."""
    out = torch.empty_like(gradient, dtype=dtype)
    stride = upstream.stride(0) if upstream.ndim else 0
    with torch.cuda.device_of(gradient):
        scale_kernel[(triton.cdiv(out.numel(), SCALE_BLOCK),)](
            gradient, upstream, out, stride, out.numel(), out.shape[1], factor, SCALE_BLOCK, num_warps=4
        )
    return out
