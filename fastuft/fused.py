"""Which fused kernels may be used on this machine's GPU; if one may not, its portable path is used.

Rooms ask here before they use a kernel; the check that compares a kernel with its portable path records here.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

LOSS, GRADIENT, ENQUEUE, MIXING, BATCHNORM = "loss", "loss gradient", "enqueue", "mixing", "grouped BatchNorm"

_refusals: dict[str, str] = {}


@functools.cache
def triton_installed() -> bool:
    """Whether the fused kernels can be imported at all."""
    return importlib.util.find_spec("triton") is not None


def refuse(kernel: str, reason: str) -> None:
    """Use the portable path of ``kernel`` in this process from now on."""
    _refusals[kernel] = reason


def refusal(*kernels: str) -> str | None:
    """Why one of ``kernels`` may not be used here, or None."""
    return next((_refusals[kernel] for kernel in kernels if kernel in _refusals), None)


@contextmanager
def without(kernel: str) -> Iterator[None]:
    """Use the portable path of ``kernel`` within the ``with`` block."""
    before = _refusals.get(kernel)
    refuse(kernel, "the portable path was asked for")
    try:
        yield
    finally:
        del _refusals[kernel]
        if before is not None:
            refuse(kernel, before)
