"""The memory of a device, and the refusal of settings that could never fit into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CGROUP = Path("/sys/fs/cgroup/memory.max")
_UNITS = ("bytes", "KB", "MB", "GB", "TB", "PB", "EB")


def total_memory(device: torch.device) -> int:
    """The memory of a device in bytes: a GPU's, or the machine's up to the limit of its container."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(_CGROUP.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no control groups of version 2, or "max"
        return machine


def refuse_beyond(available: int, needed: int, what: str, remedy: str) -> None:
    """Raise ValueError if ``what`` needs more bytes than are available.

    Args:
        available: bytes available.
        needed: bytes needed.
        what: the options and what they lead to, in the plural.
        remedy: what to choose instead.
    """
    if needed > available:
        raise ValueError(f"{what} need {_shown(needed)}, but there are only {_shown(available)}; {remedy}")


def _shown(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.0f} {_UNITS[-1]}"
