"""BatchNorm with statistics over groups of the batch, as one operator per direction.

For x [G, R, C] (channels_last: G groups of R positions each, C channels), residual r of the same shape, weight w, bias b:

    (1)  mean = sum_r x / R,   variance = sum_r (x - mean)^2 / R,   s = 1 / sqrt(variance + eps)          each [G, C]
    (2)  y = (x - mean) s w + b   [+ r]   [then max(y, 0)]

and in the backward pass, for d = dL/dy (0 where the maximum chose 0):

    (3)  dL/db = sum_g sum_r d,   dL/dw = sum_g s sum_r d (x - mean)
    (4)  dL/dx = w s (d - sum_r d / R - (x - mean) s^2 sum_r d (x - mean) / R),   dL/dr = d

Equals, for each group::

    F.relu(F.batch_norm(x, None, None, w, b, True, 0.0, eps) + r)

Sums are in fp32. Each direction takes two launches: partial sums over splits of the positions; then the sums of the splits are
combined in a fixed order, and the same programs write the result. It is deterministic: there are no atomics. Partial variances
are sums about the mean of the split's first tile, which avoids cancellation, and are combined with the formula of Chan, Golub
and LeVeque (1983). The kernels of the gradient are in ``grouped_batchnorm_gradient``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuft.kernels.channel_tiles import (
    BLOCK_ROWS,
    BLOCK_SPLITS,
    NUM_WARPS,
    load_partials,
    load_tile,
    plan_positions,
    positions,
    shape_of,
    store_tile,
)
from fastuft.kernels.launch_plan import chip
from fastuft.kernels.problem import BatchNorm


@triton.jit
def statistics_kernel(
    x_ptr,  # [G, R, C]
    mean_ptr,  # [G, S, C] fp32
    square_ptr,  # [G, S, C] fp32: sum of squares about that mean
    num_rows,  # R
    rows_per_split,
    channels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and squares of one split of a group's positions."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split, group = tl.program_id(1), tl.program_id(2)
    base, first, last = positions(group, split, num_rows, rows_per_split, channels)
    count = tl.minimum(last - first, BLOCK_R).to(tl.float32)
    origin = tl.sum(load_tile(x_ptr, base, first, columns, last, channels, BLOCK_R), 0) / count
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_R):
        deviation = load_tile(x_ptr, base, start, columns, last, channels, BLOCK_R) - origin[None, :]
        deviation = tl.where((start + tl.arange(0, BLOCK_R) < last)[:, None], deviation, 0.0)
        total += deviation
        squares += deviation * deviation
    moved = tl.sum(total, 0) / (last - first).to(tl.float32)
    square = tl.maximum(tl.sum(squares, 0) - moved * moved * (last - first).to(tl.float32), 0.0)
    out = (group * tl.num_programs(1) + split) * channels + columns
    tl.store(mean_ptr + out, origin + moved, columns < channels)
    tl.store(square_ptr + out, square, columns < channels)


@triton.jit
def merged_statistics(mean_ptr, square_ptr, group, columns, num_splits, num_rows, rows_per_split, channels, BLOCK_S):
    """(mean, sum of squares about it) [C] of all splits of a group."""
    mean = tl.zeros_like(columns).to(tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        count = tl.maximum(tl.minimum(num_rows - splits * rows_per_split, rows_per_split), 0).to(tl.float32)
        part = load_partials(mean_ptr, group, start, columns, num_splits, channels, BLOCK_S)
        mean += tl.sum(part * (count / num_rows)[:, None], 0)
    square = tl.zeros_like(columns).to(tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        count = tl.maximum(tl.minimum(num_rows - splits * rows_per_split, rows_per_split), 0).to(tl.float32)
        part = load_partials(mean_ptr, group, start, columns, num_splits, channels, BLOCK_S) - mean[None, :]
        within = load_partials(square_ptr, group, start, columns, num_splits, channels, BLOCK_S)
        square += tl.sum(within + part * part * count[:, None], 0)
    return mean, square


@triton.jit
def normalize_kernel(
    x_ptr,  # [G, R, C]
    weight_ptr,  # [C], read where AFFINE
    bias_ptr,  # [C], read where AFFINE
    residual_ptr,  # [G, R, C], read where RESIDUAL
    partial_mean_ptr,  # [G, S, C] fp32
    partial_square_ptr,  # [G, S, C] fp32
    out_ptr,  # [G, R, C]
    mean_ptr,  # [G, C] fp32
    variance_ptr,  # [G, C] fp32, unbiased
    scale_ptr,  # [G, C] fp32: s
    num_rows,
    rows_per_split,
    channels,
    eps,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """(1), (2) of one split of a group's positions."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split, group = tl.program_id(1), tl.program_id(2)
    inside = columns < channels
    mean, square = merged_statistics(
        partial_mean_ptr, partial_square_ptr, group, columns, tl.num_programs(1), num_rows, rows_per_split, channels,
        BLOCK_S,
    )  # fmt: skip
    scale = 1.0 / tl.sqrt(square / num_rows + eps)
    if split == 0:
        out = group * channels + columns
        tl.store(mean_ptr + out, mean, inside)
        tl.store(variance_ptr + out, square / tl.maximum(num_rows - 1, 1), inside)
        tl.store(scale_ptr + out, scale, inside)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if AFFINE:
        scale *= tl.load(weight_ptr + columns, inside, 0.0).to(tl.float32)
        bias = tl.load(bias_ptr + columns, inside, 0.0).to(tl.float32)
    base, first, last = positions(group, split, num_rows, rows_per_split, channels)
    for start in range(first, last, BLOCK_R):
        y = (load_tile(x_ptr, base, start, columns, last, channels, BLOCK_R) - mean[None, :]) * scale[None, :] + bias[
            None, :
        ]
        if RESIDUAL:
            y += load_tile(residual_ptr, base, start, columns, last, channels, BLOCK_R)
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)  # NaN stays
        store_tile(out_ptr, base, start, columns, last, channels, y, BLOCK_R)


def unsupported(x: Tensor) -> str | None:
    """Why the kernels cannot take activations of this kind, or None if they can."""
    if x.device.type == "cuda" and chip(x.device)[0] < 80:
        return "the GPU is older than sm_80"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"activations are {x.dtype}"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "activations are not in channels_last"
    return "the batch is empty" if x.numel() == 0 else None


def forward(problem: BatchNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(1), (2) of x in channels_last.

    Returns:
        (y like x; means, unbiased variances and s, each fp32 [G, C]).
    """
    x, weight, bias, residual, group, eps, relu = problem
    groups, num_rows, channels = shape_of(x, group)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    with torch.cuda.device_of(x):
        block, splits, rows_per_split = plan_positions(groups, num_rows, channels, chip(x.device)[1])
        grid = (triton.cdiv(channels, block), splits, groups)
        partial = torch.empty(2, groups, splits, channels, dtype=torch.float32, device=x.device)
        out = torch.empty_like(x)
        means, variances, scales = (
            torch.empty(groups, channels, dtype=torch.float32, device=x.device) for _ in range(3)
        )
        statistics_kernel[grid](
            x, partial[0], partial[1], num_rows, rows_per_split, channels, BLOCK_ROWS, block, num_warps=NUM_WARPS
        )
        normalize_kernel[grid](
            x, x if weight is None else weight, x if bias is None else bias, x if residual is None else residual,
            partial[0], partial[1], out, means, variances, scales, num_rows, rows_per_split, channels, eps,
            weight is not None, residual is not None, relu, BLOCK_ROWS, block, BLOCK_SPLITS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out, means, variances, scales
