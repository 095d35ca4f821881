"""One line of the doctor's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's output.

    Args:
        part: what was checked.
        state: ok, missing (fastuft works without it, slower or with less), or problem (required, or present but broken).
        found: what was found.
        remedy: what to do; empty if nothing.
    """

    part: str
    state: State
    found: str
    remedy: str = ""
