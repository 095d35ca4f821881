"""The gradient of BatchNorm over groups: (3), (4) of ``grouped_batchnorm``, also in two launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuft.kernels.channel_tiles import (
    BLOCK_ROWS,
    BLOCK_SPLITS,
    NUM_WARPS,
    load_tile,
    merged_sum,
    plan_positions,
    positions,
    shape_of,
    store_tile,
)
from fastuft.kernels.launch_plan import chip
from fastuft.kernels.problem import BatchNormGradient


@triton.jit
def load_gradient(grad_ptr, out_ptr, base, start, columns, last, channels, RELU: tl.constexpr, BLOCK_R: tl.constexpr):
    """d: the upstream gradient, 0 where the maximum chose 0."""
    d = load_tile(grad_ptr, base, start, columns, last, channels, BLOCK_R)
    if RELU:
        d = tl.where(load_tile(out_ptr, base, start, columns, last, channels, BLOCK_R) <= 0.0, 0.0, d)
    return d


@triton.jit
def gradient_sums_kernel(
    grad_ptr,  # [G, R, C]
    x_ptr,  # [G, R, C]
    out_ptr,  # [G, R, C], read where RELU
    mean_ptr,  # [G, C] fp32
    sum_ptr,  # [G, S, C] fp32: sum of d
    product_ptr,  # [G, S, C] fp32: sum of d (x - mean)
    num_rows,
    rows_per_split,
    channels,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sums of (3) over one split of a group's positions."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split, group = tl.program_id(1), tl.program_id(2)
    inside = columns < channels
    mean = tl.load(mean_ptr + group * channels + columns, inside, 0.0)
    base, first, last = positions(group, split, num_rows, rows_per_split, channels)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    product = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_R):
        d = load_gradient(grad_ptr, out_ptr, base, start, columns, last, channels, RELU, BLOCK_R)
        total += d
        product += d * (load_tile(x_ptr, base, start, columns, last, channels, BLOCK_R) - mean[None, :])
    out = (group * tl.num_programs(1) + split) * channels + columns
    tl.store(sum_ptr + out, tl.sum(total, 0), inside)
    tl.store(product_ptr + out, tl.sum(product, 0), inside)


@triton.jit
def gradient_kernel(
    grad_ptr,  # [G, R, C]
    x_ptr,  # [G, R, C]
    weight_ptr,  # [C], read where AFFINE
    out_ptr,  # [G, R, C], read where RELU
    mean_ptr,  # [G, C] fp32
    scale_ptr,  # [G, C] fp32: s
    sum_ptr,  # [G, S, C] fp32
    product_ptr,  # [G, S, C] fp32
    grad_x_ptr,  # [G, R, C]
    grad_residual_ptr,  # [G, R, C], written where RESIDUAL
    grad_weight_ptr,  # [C] fp32, written where AFFINE
    grad_bias_ptr,  # [C] fp32, written where AFFINE
    num_groups,
    num_rows,
    rows_per_split,
    channels,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """(4) for one split of a group's positions; an extra row of programs computes (3) at the same time."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    inside = columns < channels
    group = tl.program_id(2)
    if AFFINE:
        group -= 1
        if group < 0:
            if split == 0:
                grad_weight = tl.zeros([BLOCK_C], tl.float32)
                grad_bias = tl.zeros([BLOCK_C], tl.float32)
                for g in range(num_groups):
                    s = tl.load(scale_ptr + g * channels + columns, inside, 0.0)
                    grad_weight += s * merged_sum(product_ptr, g, columns, num_splits, channels, BLOCK_S)
                    grad_bias += merged_sum(sum_ptr, g, columns, num_splits, channels, BLOCK_S)
                tl.store(grad_weight_ptr + columns, grad_weight, inside)
                tl.store(grad_bias_ptr + columns, grad_bias, inside)
            return
    mean = tl.load(mean_ptr + group * channels + columns, inside, 0.0)
    scale = tl.load(scale_ptr + group * channels + columns, inside, 0.0)
    mean_d = merged_sum(sum_ptr, group, columns, num_splits, channels, BLOCK_S) / num_rows
    slope = merged_sum(product_ptr, group, columns, num_splits, channels, BLOCK_S) / num_rows * scale * scale
    if AFFINE:
        scale *= tl.load(weight_ptr + columns, inside, 0.0).to(tl.float32)
    base, first, last = positions(group, split, num_rows, rows_per_split, channels)
    for start in range(first, last, BLOCK_R):
        d = load_gradient(grad_ptr, out_ptr, base, start, columns, last, channels, RELU, BLOCK_R)
        if RESIDUAL:
            store_tile(grad_residual_ptr, base, start, columns, last, channels, d, BLOCK_R)
        deviation = load_tile(x_ptr, base, start, columns, last, channels, BLOCK_R) - mean[None, :]
        grad_x = scale[None, :] * (d - mean_d[None, :] - deviation * slope[None, :])
        store_tile(grad_x_ptr, base, start, columns, last, channels, grad_x, BLOCK_R)


def backward(problem: BatchNormGradient) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(3), (4) of x in channels_last.

    Returns:
        (dL/dx, dL/dw, dL/db, dL/dr); those of what was not there are empty.
    """
    grad, x, weight, out, means, scales, group, _, residual = problem
    groups, num_rows, channels = shape_of(x, group)
    grad = grad.contiguous(memory_format=torch.channels_last)
    affine = weight is not None
    with torch.cuda.device_of(x):
        block, splits, rows_per_split = plan_positions(groups, num_rows, channels, chip(x.device)[1])
        blocks = triton.cdiv(channels, block)
        partial = torch.empty(2, groups, splits, channels, dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x)
        grad_residual = torch.empty_like(x) if residual else x.new_empty(0)
        grad_weight, grad_bias = (
            torch.empty(channels if affine else 0, dtype=torch.float32, device=x.device) for _ in range(2)
        )
        gradient_sums_kernel[(blocks, splits, groups)](
            grad, x, x if out is None else out, means, partial[0], partial[1], num_rows, rows_per_split, channels,
            out is not None, BLOCK_ROWS, block, num_warps=NUM_WARPS,
        )  # fmt: skip
        gradient_kernel[(blocks, splits, groups + affine)](
            grad, x, x if weight is None else weight, x if out is None else out, means, scales, partial[0], partial[1],
            grad_x, grad_residual, grad_weight, grad_bias, groups, num_rows, rows_per_split, channels, affine, residual,
            out is not None, BLOCK_ROWS, block, BLOCK_SPLITS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias, grad_residual
