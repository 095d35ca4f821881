"""Launch parameters of the sweep by chip, precision, width and rows, which the launcher reads and the tests compile."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

ARCHS = (80, 90, 100)
PRECISIONS = ("bf16", "fp16", "tf32", "ieee")
WIDTHS = (16, 32, 64, 128, 256, 512)  # padded widths; the kernels mask the rest
# How a tile of keys gets from memory to the product: unchanged, from addresses that descriptors allow or from others;
# converted in registers to another dtype; or decoded there.
Keys = Literal["aligned", "unaligned", "converted", "fp8"]
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


def _half(arch: int, width: int, tall: bool, keys: Keys) -> Launch:
    if width == 512:
        return Launch(32, 32, 8, 2, 1)
    if width == 256:
        return Launch(64, 64, 8, 2, 1)
    if width == 128:
        return Launch(128, 64, 8, 3, 1) if tall else Launch(64, 64, 4, 4, 1 if keys == "converted" else 2)
    # On sm_100 the other of the two entries spills.
    return Launch(128, 64, 8, 3, 2) if width <= 32 else Launch(64, 64, 4, 4, 3)


def _ampere(width: int, tall: bool, keys: Keys) -> Launch:
    """Half precision on sm_80, where the sums and both operands of a product are in registers."""
    if width == 512:
        return Launch(32, 32, 8, 2, 1)
    if width == 256:  # 64 keys of an fp32 queue would need more shared memory than there is
        return Launch(64, 64 if keys == "aligned" else 32, 8, 2, 1)
    if width == 128:
        if tall:
            return Launch(128, 32, 8, 2, 1)
        # With 32 keys two programs fit, four tiles in flight each; converted tiles take too many registers for that.
        return Launch(64, 64, 4, 3, 1) if keys == "converted" else Launch(64, 32, 4, 4, 2)
    if tall:
        return Launch(128, 64, 8, 2, 2 if width == 16 else 1)
    return Launch(64, 64, 4, 3, 3 if width <= 32 else 2)


def _single(arch: int, precision: str, width: int) -> Launch:
    """fp32 tiles; exact products run on the CUDA cores, with small tiles."""
    if width == 512:
        return Launch(16, 16, 4, 1, 1 if arch == 80 else 2)
    crowded = arch == 80 and (width == 256 or (width == 128 and precision == "tf32"))
    return Launch(16, 32 if width <= 128 else 16, 4, 2, 2 if crowded else 3)


def _packed(arch: int, width: int) -> Launch:
    """Half precision over an fp8 queue, which is decoded in registers; it has half the bytes, so short tiles suffice."""
    if width == 512:
        return Launch(64, 16, 8, 2, 1) if arch == 90 else Launch(16, 32, 8, 2, 1)
    if width == 256 and arch < 100:
        return Launch(64 if arch == 90 else 32, 32, 8, 2, 1)
    if arch == 80:
        return Launch(64, 32, 8, 2, 1) if width == 128 else _ampere(width, False, "fp8")
    return _hopper(width, False) if arch == 90 else _half(arch, width, False, "fp8")


def launch(arch: int, precision: str, width: int, tall: bool, keys: Keys) -> Launch:
    """The configuration for a chip (80, 90, 100, ...), precision and padded width.

    Half precision: if there are many rows (``tall``), 128 of them share each tile of keys, so the queue is read from the L2
    cache half as often as with 64. Registers limit the width of a tile of keys (accumulators [block_b, width] and scores
    [block_b, block_k], both fp32). Tiles of keys that pass through registers leave less room for wide rows. As many programs
    share a multiprocessor as its registers, shared and tensor memory hold, up to three.
    """
    if precision in ("ieee", "tf32"):
        return _single(arch, precision, width)
    if keys == "fp8":
        return _packed(arch, width)
    if arch == 80:
        return _ampere(width, tall, keys)
    if arch == 90 and (width, keys) in ((256, "converted"), (512, "unaligned")):
        return Launch(64, 32, 8, 2, 1)  # 64 keys would spill, and at 512 columns so would 32 that are converted
    return (
        _hopper(width, tall) if arch == 90 and (keys == "aligned" or width <= 128) else _half(arch, width, tall, keys)
    )


class Entry(NamedTuple):
    """The arguments of :func:`launch`, and what it gives for them."""

    arch: int
    precision: str
    width: int
    tall: bool
    keys: Keys
    config: Launch


def table() -> Iterator[Entry]:
    """Every configuration: each distinct one of a chip, precision and width once for every kind of keys it differs for."""
    for arch, precision, width in itertools.product(ARCHS, PRECISIONS, WIDTHS):
        seen = set()
        for keys, tall in itertools.product(get_args(Keys), (False, True)):
            if precision in ("tf32", "ieee") and keys != "aligned":
                continue  # fp32 tiles take one configuration, and no fp8 queue
            config = launch(arch, precision, width, tall, keys)
            # Without descriptors, alignment makes no difference.
            kind = "aligned" if keys == "unaligned" and not config.descriptors else keys
            if (config, kind) not in seen:
                seen.add((config, kind))
                yield Entry(arch, precision, width, tall, keys, config)
