"""Launch parameters of the sweep, by chip, element size, width and rows: what the launcher reads and the tests compile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ARCHS = (80, 90, 100)
WIDTHS = (16, 32, 64, 128, 256, 512)  # padded widths; the kernels mask the rest
ROWS = (64, 256)  # one entry for few rows, one for many
# Shared memory a program may ask for. 80 also serves 8.6, 8.9 and 12.x, which allow less than an A100's 166,912.
SHARED_BYTES = {80: 101_376, 90: 232_448, 100: 232_448}


@dataclass(frozen=True)
class Launch:
    """One configuration.

    Args:
        block_b: rows a program holds.
        block_k: keys a program reads at a time.
        num_warps: warps per program.
        num_stages: tiles of keys in flight.
        branch: rescale accumulators behind a branch, taken when some row's maximum has grown; otherwise every tile
            multiplies them, mostly by 1. Triton 3.7 cannot compile that branch for tensor memory (sm_100).
        peel: read the whole tiles of a split in a loop without a mask and the rest after it. Half precision on sm_80
            and sm_90 then has a fifth and a third fewer instructions a tile; single precision would spill.
    """

    block_b: int
    block_k: int
    num_warps: int
    num_stages: int
    branch: bool = True
    peel: bool = False


def launch(arch: int, itemsize: int, width: int, rows: int) -> Launch:
    """The configuration for a chip (80, 90, 100, ...), bytes an element (2 or 4), padded width and number of rows.

    Half precision: 128 rows share each tile of keys where there are that many, because the queue then crosses the L2
    cache half as often as with 64; registers bound the width of a tile of keys (accumulators [block_b, width] and scores
    [block_b, block_k], both fp32). Single precision multiplies on the CUDA cores in exact arithmetic, with small tiles.
    """
    if itemsize == 4:
        if width <= 64:
            return Launch(32, 32, 4, 2)
        return Launch(16, 32, 4, 2) if width <= 256 else Launch(16, 16, 4, 1)
    branch = peel = arch < 100
    stages = 2 if arch < 90 else 3
    if width <= 128:
        if rows <= 64:
            return Launch(64, 64, 4, stages + 1, branch, peel)
        return Launch(128, 32 if arch < 90 and width == 128 else 64, 8, stages, branch, peel)
    return Launch(64, 64, 8, 2, branch, peel) if width == 256 else Launch(32, 32, 8, 2, branch, peel)


def table() -> Iterator[tuple[int, int, int, int, Launch]]:
    """(arch, itemsize, width, rows, configuration), each distinct configuration of a width once."""
    for arch in ARCHS:
        for itemsize in (2, 4):
            for width in WIDTHS:
                seen = set()
                for rows in ROWS:
                    found = launch(arch, itemsize, width, rows)
                    if found not in seen:
                        seen.add(found)
                        yield arch, itemsize, width, rows, found
