"""Tiles of channels_last activations, [positions, channels]: how splits of positions are planned, read and summed."""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_CHANNELS = 32, 64
BLOCK_SPLITS = 16  # partial sums that a program reads at a time
NUM_WARPS = 4
MAX_SPLITS = 64
_PROGRAMS = 8  # programs per multiprocessor that a launch aims for


@functools.cache
def plan_positions(groups: int, num_rows: int, channels: int, multiprocessors: int) -> tuple[int, int, int]:
    """(channels per program, splits of a group's positions, positions per split), with whole tiles and no empty split."""
    block_channels = min(BLOCK_CHANNELS, max(16, triton.next_power_of_2(channels)))
    tiles = triton.cdiv(num_rows, BLOCK_ROWS)
    programs = groups * triton.cdiv(channels, block_channels)
    splits = max(1, min(tiles, MAX_SPLITS, _PROGRAMS * multiprocessors // programs))
    rows_per_split = triton.cdiv(tiles, splits) * BLOCK_ROWS
    return block_channels, triton.cdiv(num_rows, rows_per_split), rows_per_split


def shape_of(x: Tensor, group: int) -> tuple[int, int, int]:
    """(groups, positions per group, channels)."""
    return x.shape[0] // group, group * x.shape[2] * x.shape[3], x.shape[1]


@triton.jit
def positions(group, split, num_rows, rows_per_split, channels):
    """(offset of a group's position 0, first position of a split, end of the split)."""
    first = split * rows_per_split
    return group.to(tl.int64) * num_rows * channels, first, tl.minimum(first + rows_per_split, num_rows)


@triton.jit
def tile_of(base, start, columns, last, channels, BLOCK_R: tl.constexpr):
    """(offset of a tile, offsets within it, which are inside) for positions from ``start`` on; ``base`` is the offset of 0."""
    rows = tl.arange(0, BLOCK_R)
    inside = (start + rows < last)[:, None] & (columns < channels)[None, :]
    return base + tl.cast(start, tl.int64) * channels, rows[:, None] * channels + columns[None, :], inside


@triton.jit
def load_tile(ptr, base, start, columns, last, channels, BLOCK_R: tl.constexpr):
    """A tile [BLOCK_R, C] of a group's positions as fp32, 0 outside."""
    offset, within, inside = tile_of(base, start, columns, last, channels, BLOCK_R)
    return tl.load(ptr + offset + within, inside, 0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, base, start, columns, last, channels, value, BLOCK_R: tl.constexpr):
    offset, within, inside = tile_of(base, start, columns, last, channels, BLOCK_R)
    tl.store(ptr + offset + within, value.to(ptr.dtype.element_ty), inside)


@triton.jit
def load_partials(ptr, group, start, columns, num_splits, channels, BLOCK_S: tl.constexpr):
    """[BLOCK_S, C] of one group's partial sums, 0 outside."""
    splits = start + tl.arange(0, BLOCK_S)
    inside = (splits[:, None] < num_splits) & (columns[None, :] < channels)
    return tl.load(ptr + (group * num_splits + splits)[:, None] * channels + columns[None, :], inside, 0.0)


@triton.jit
def merged_sum(ptr, group, columns, num_splits, channels, BLOCK_S: tl.constexpr):
    """[C] over all splits of a group, in order."""
    total = tl.zeros_like(columns).to(tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        total += tl.sum(load_partials(ptr, group, start, columns, num_splits, channels, BLOCK_S), 0)
    return total
