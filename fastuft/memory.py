"""How much memory a device has, and the refusal of what it could never hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CGROUP = Path("/sys/fs/cgroup/memory.max")
_UNITS = ("bytes", "KB", "MB", "GB", "TB", "PB", "EB")


def total_memory(device: torch.device) -> int:
    """Bytes that a device has: a GPU's memory, or the machine's, at most its container's limit."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(_CGROUP.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no control groups of version 2, or "max"
        return machine


def refuse_beyond(available: int, needed: int, what: str, remedy: str) -> None:
    """Raise ValueError where ``what`` takes more bytes than there are.

    Args:
        available: bytes that there are.
        needed: bytes that it takes.
        what: the options and what they make, in the plural.
        remedy: what to choose instead.
    """
    if needed > available:
        raise ValueError(f"{what} take {_shown(needed)}, and there are {_shown(available)}; {remedy}")


def _shown(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.0f} {_UNITS[-1]}"
