"""Bad files: how they are named, reported and listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastuft.atomic import write_whole
from fastuft.names import printable


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be used, and the reason."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


class BadImageError(ValueError):
    """An image file that cannot be used; the message names it, the reason and the remedy.

    Args:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        remedy = "Remove or replace the file (`fastuft verify-data` lists all bad ones), or set on_bad_file=skip"
        super().__init__(f"{printable(path)}: {reason}. {remedy}")
        self.path = path
        self.reason = reason


def write_bad_list(path: str | Path, bad: Sequence[BadFile]) -> None:
    """Write one line per bad file: path, tab, reason; paths are escaped as in messages, so each is on one line."""
    write_whole(Path(path), "".join(f"{printable(entry.path)}\t{entry.reason}\n" for entry in bad).encode())
