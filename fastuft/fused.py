"""Fused kernels that gave wrong figures on this machine's chip: from then on their portable paths run.

Rooms ask here before they use a kernel; whoever checked one on the chip writes here.
"""

from __future__ import annotations

_refusals: dict[str, str] = {}


def refuse(kernel: str, reason: str) -> None:
    """Use the portable path of ``kernel`` in this process from now on."""
    _refusals[kernel] = reason


def refusal(kernel: str) -> str | None:
    """Why ``kernel`` may not be used here, or None."""
    return _refusals.get(kernel)


def refusals() -> dict[str, str]:
    """Every kernel that may not be used here, and why."""
    return dict(_refusals)


def trust_again() -> None:
    """Forget all refusals."""
    _refusals.clear()
