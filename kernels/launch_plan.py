"""How a sweep is shared out over a chip: which chip it is, and how many splits of the queue run side by side."""

from __future__ import annotations

import functools

import torch
import triton

from fastuft.kernels.launch_table import Launch

PARTIAL_BYTES = 1 << 23  # most that the partial sums of several splits take: 64 splits at B=256, D=128


@functools.cache
def _cuda_chip(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    # Consumer Blackwell (12.x) has neither tensor memory nor the shared memory of 9.0 and 10.0.
    return 80 if properties.major == 12 else properties.major * 10, properties.multi_processor_count


def chip(device: torch.device) -> tuple[int, int]:
    """(arch, multiprocessors)."""
    if device.type != "cuda":
        return 90, 4  # the interpreter runs anywhere; few splits keep it quick
    return _cuda_chip(torch.cuda.current_device() if device.index is None else device.index)


def plan_splits(num_rows: int, num_keys: int, width: int, config: Launch, multiprocessors: int) -> tuple[int, int]:
    """(splits, keys a split): as many programs as one wave holds, each a whole number of tiles.

    Fewer where partial sums [splits, B, D] in fp32 would exceed PARTIAL_BYTES, whatever the chip.
    """
    row_tiles = triton.cdiv(num_rows, config.block_b)
    key_tiles = max(1, triton.cdiv(num_keys, config.block_k))
    affordable = PARTIAL_BYTES // (4 * num_rows * width)
    splits = max(1, min(key_tiles, multiprocessors // row_tiles, affordable))
    tiles_per_split = triton.cdiv(key_tiles, splits)
    return triton.cdiv(key_tiles, tiles_per_split), tiles_per_split * config.block_k
