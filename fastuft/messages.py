"""Notes for the user, apart from a program's own output."""

from __future__ import annotations

import os

from fastuft.console import say

_said: set[str] = set()


def note(text: str) -> None:
    """Print a line on standard error, once per process and on the first rank only."""
    if text not in _said and os.environ.get("RANK", "0") == "0":
        _said.add(text)
        say(text, error=True)
