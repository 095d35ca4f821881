"""Launch parameters of the sweep by chip, precision, width and rows, which the launcher reads and the tests compile."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

ARCHS = (80, 90, 100)
PRECISIONS = ("bf16", "fp16", "tf32", "ieee")
WIDTHS = (16, 32, 64, 128, 256, 512)  # padded widths; the kernels mask the rest
# Shared memory available to a program. 80 also covers 8.6, 8.9 and 12.x, which allow less than an A100's 166,912.
SHARED_BYTES = {80: 101_376, 90: 232_448, 100: 232_448}


@dataclass(frozen=True)
class Launch:
    """One configuration.

    Args:
        block_b: rows of a tile.
        block_k: keys of a tile.
        num_warps: warps per program.
        num_stages: tiles of keys in flight.
        ctas: programs per multiprocessor that the plan assumes.
        descriptors: whether to read aligned tiles with the tensor memory accelerator; otherwise through pointers.
        max_registers: bound on the registers per thread, if ``ctas`` needs one.
    """

    block_b: int
    block_k: int
    num_warps: int
    num_stages: int
    ctas: int
    descriptors: bool = False
    max_registers: int | None = None


def _hopper(width: int, tall: bool) -> Launch:
    """Half precision on sm_90: queries are in shared memory, a warpgroup has 64 rows, products are never serialized."""
    if width == 512:
        return Launch(64, 64, 8, 2, 1, True)  # two warpgroups halve the width of one tile's sums
    if width == 256:
        return Launch(128, 64, 8, 2, 1, True) if tall else Launch(64, 64, 4, 2, 2, True)
    if tall:
        return Launch(128, 64 if width < 128 else 32, 8, 3, 2, True, max_registers=128)
    return Launch(64, 64, 4, 3, 2 if width == 128 else 3, True)


def _half(arch: int, width: int, tall: bool) -> Launch:
    stages = 2 if arch < 90 else 3
    if arch == 100 and width <= 64:  # the other of the two entries spills there
        return Launch(128, 64, 8, 3, 1) if width <= 32 else Launch(64, 64, 4, 4, 1)
    if width == 512:
        return Launch(32, 32, 8, 2, 1)
    if width == 256:
        return Launch(64, 64, 8, 2, 1)
    if not tall:
        return Launch(64, 64, 4, stages + 1, 1)
    return Launch(128, 32 if arch < 90 and width == 128 else 64, 8, stages, 1)


def _single(width: int) -> Launch:
    """fp32 tiles; exact products run on the CUDA cores, with small tiles."""
    if width <= 128:
        return Launch(16, 32, 4, 2, 2)
    return Launch(16, 16, 4, 2, 2) if width == 256 else Launch(16, 16, 4, 1, 1)


def _packed(arch: int, width: int) -> Launch:
    """Half precision over an fp8 queue, which is decoded in registers; it has half the bytes, so short tiles suffice."""
    if width == 512:
        return Launch(16, 32, 8, 2, 1)
    if width == 256 and arch < 100:
        return Launch(64 if arch == 90 else 32, 32, 8, 2, 1)
    if width == 128 and arch == 80:
        return Launch(64, 32, 8, 2, 1)
    return _hopper(width, False) if arch == 90 else _half(arch, width, False)


def launch(arch: int, precision: str, width: int, tall: bool, direct: bool, packed: bool = False) -> Launch:
    """The configuration for a chip (80, 90, 100, ...), precision and padded width.

    Half precision: if there are many rows (``tall``), 128 of them share each tile of keys, so the queue is read from the L2
    cache half as often as with 64. Registers limit the width of a tile of keys (accumulators [block_b, width] and scores
    [block_b, block_k], both fp32). ``direct``: tiles go from memory to the product unchanged, through descriptors; tiles that
    pass through registers leave less room for wide rows. ``packed``: the queue is fp8.
    """
    if precision in ("ieee", "tf32"):
        return _single(width)
    if packed:
        return _packed(arch, width)
    if arch == 80 and width == 256 and not direct:
        return Launch(64, 32, 8, 2, 1)  # 64 keys of an fp32 queue would need more shared memory than there is
    return _hopper(width, tall) if arch == 90 and (direct or width <= 128) else _half(arch, width, tall)


class Entry(NamedTuple):
    """The arguments of :func:`launch`, and what it gives for them."""

    arch: int
    precision: str
    width: int
    tall: bool
    direct: bool
    packed: bool
    config: Launch


def table() -> Iterator[Entry]:
    """Every configuration: each distinct one of a chip, precision and width once for queues that are fp8 and for others."""
    for arch, precision, width, packed in itertools.product(ARCHS, PRECISIONS, WIDTHS, (False, True)):
        if packed and precision in ("tf32", "ieee"):
            continue
        seen = set()
        for direct, tall in itertools.product((True, False), (False, True)):
            found = launch(arch, precision, width, tall, direct, packed)
            if found not in seen:
                seen.add(found)
                yield Entry(arch, precision, width, tall, direct and not packed, packed, found)
