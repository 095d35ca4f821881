"""Tiles of activations in channels_last, [positions, channels], and sums over splits of the positions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(base, start, columns, last, channels, BLOCK_R: tl.constexpr):
    """(offset of a tile, offsets within it, which are inside) of positions from ``start`` on; ``base`` is position 0's."""
    rows = tl.arange(0, BLOCK_R)
    inside = (start + rows < last)[:, None] & (columns < channels)[None, :]
    return base + tl.cast(start, tl.int64) * channels, rows[:, None] * channels + columns[None, :], inside


@triton.jit
def load_tile(ptr, base, start, columns, last, channels, BLOCK_R: tl.constexpr):
    """Tile [BLOCK_R, C] of a group's positions as fp32, 0 outside."""
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
