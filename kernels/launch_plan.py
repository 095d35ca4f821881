"""How a sweep is divided over a chip: the kind of chip, and the number of units per program."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastuft.kernels.launch_table import Launch

# The largest number of rows of partial results from tiles of 64 rows or fewer: 8.7 MB at D = 128.
PARTIAL_ROWS = 264 * 64
# Each tile of rows reads the whole queue from the L2 cache. Above this many bytes, taller tiles halve them: tiles of 64 rows
# read 1.07 GB at B = 4096, K = 65,536, D = 128.
TALL_BYTES = 1 << 28


@dataclass(frozen=True)
class Plan:
    """The units of a sweep: row tiles times key tiles, ``units_per_program`` for each program, fewer for the last."""

    row_tiles: int
    key_tiles: int
    units_per_program: int

    @property
    def units(self) -> int:
        return self.row_tiles * self.key_tiles

    @property
    def programs(self) -> int:
        return -(-self.units // self.units_per_program)


@functools.cache
def _cuda_chip(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    # Consumer Blackwell (12.x) has neither tensor memory nor the shared memory of 9.0 and 10.0.
    return 80 if properties.major == 12 else properties.major * 10, properties.multi_processor_count


def chip(device: torch.device) -> tuple[int, int]:
    """(arch, multiprocessors)."""
    if device.type != "cuda":
        return 90, 4  # the interpreter runs anywhere; few programs keep it fast
    return _cuda_chip(torch.cuda.current_device() if device.index is None else device.index)


def tall_rows(num_rows: int, num_keys: int, width: int) -> bool:
    """Whether a half-precision sweep with tiles of 64 rows would read more than TALL_BYTES."""
    return -(-num_rows // 64) * num_keys * width * 2 > TALL_BYTES


def plan_units(num_rows: int, num_keys: int, config: Launch, multiprocessors: int) -> Plan:
    """The same number of units for each program of one full wave, however many rows there are."""
    row_tiles = -(-num_rows // config.block_b)
    key_tiles = max(1, -(-num_keys // config.block_k))
    per_multiprocessor = config.ctas
    if config.block_b <= 64:
        # The same number on each, or those with one more would work while the others wait.
        allowed = PARTIAL_ROWS // min(config.block_b, num_rows) // multiprocessors
        per_multiprocessor = min(per_multiprocessor, max(1, allowed))
    programs = multiprocessors * per_multiprocessor
    return Plan(row_tiles, key_tiles, -(-row_tiles * key_tiles // programs))
