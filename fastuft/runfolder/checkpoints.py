"""Checkpoints: written whole, checked, and without risk to the last good one. A checkpoint is a file; a state, its content."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastuft.atomic import remove_leftovers, write_whole
from fastuft.runfolder.records import read_file

FORMAT = "fastuft checkpoint 1"
_NAME = re.compile(r"^step_(\d{8,})\.pt$")

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or could not be written; the message says why, and what is left."""


@dataclass(frozen=True)
class Newest(Generic[T]):
    """The newest whole checkpoint of a folder.

    Args:
        path: its path, or None if no checkpoint is whole.
        content: what was read from it.
        reasons: why newer ones were skipped, one message each.
    """

    path: Path | None
    content: T | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: their folder, which need not exist.
    """

    folder: Path

    def path(self, step: int) -> Path:
        """The path of a step's checkpoint."""
        return self.folder / f"step_{step:08d}.pt"

    def all(self) -> list[tuple[int, Path]]:
        """(step, path) of all checkpoints, newest first, damaged ones included."""
        named = ((_NAME.match(path.name), path) for path in self.folder.glob("step_*.pt"))
        return sorted(((int(name[1]), path) for name, path in named if name), reverse=True)

    def save(self, step: int, state: dict[str, Any], *, keep_last: int, keep_every: int) -> Path:
        """Write one checkpoint with its digest, then drop old ones.

        Args:
            step: steps done.
            state: only tensors, numbers, strings, lists and dicts.
            keep_last: how many of the newest whole checkpoints to keep, including this one.
            keep_every: also keep checkpoints whose step is a multiple of it; 0 keeps no others.

        Raises:
            CheckpointError: it could not be written (disk full, folder removed); earlier checkpoints are unchanged.
        """
        import torch

        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **state}, buffer)
        content = buffer.getbuffer()
        path = self.path(step)
        try:
            self.folder.mkdir(exist_ok=True)  # the run folder itself must still exist
            remove_leftovers(self.folder)
            # The digest first: a kill between the two leaves a digest without a file, which nothing reads.
            write_whole(_digest_path(path), hashlib.sha256(content).hexdigest().encode())
            write_whole(path, content)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path} could not be written ({error.strerror}); the last good one is "
                f"{self.last_good()}. Free some disk space and continue with resume=auto."
            ) from error
        self._drop_old(step, keep_last, keep_every)
        return path

    def _drop_old(self, written: int, keep_last: int, keep_every: int) -> None:
        """Drop checkpoints older than the ``keep_last`` newest whole ones, of which the one just written is the first."""
        kept = 1
        for step, path in self.all():
            if step == written:
                continue
            if kept < keep_last:
                kept += _is_whole(path)  # a damaged one does not count
            elif step < written and not (keep_every and step % keep_every == 0):
                path.unlink(missing_ok=True)
                _digest_path(path).unlink(missing_ok=True)

    def newest(self, read: Callable[[Path], T]) -> Newest[T]:
        """The newest whole checkpoint.

        Args:
            read: :func:`load_checkpoint` to get its state, :func:`check_digest` only to check that it is whole.
        """
        reasons: list[str] = []
        for _, path in self.all():
            try:
                return Newest(path, read(path), tuple(reasons))
            except CheckpointError as error:
                reasons.append(str(error))
        return Newest(None, None, tuple(reasons))

    def last_good(self) -> Path | str:
        """The newest whole checkpoint, or "none", for a message."""
        return self.newest(check_digest).path or "none"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU, checked against its digest; nothing in it is executed.

    Raises:
        CheckpointError: missing, truncated, altered, or not written by this program.
    """
    import torch

    if not path.is_file():
        raise CheckpointError(f"resume={str(path)!r} is not a file; name a checkpoint, or use resume=auto")
    content = _read(path)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for other files
        raise CheckpointError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this program; use it as init instead")
    return state


def check_digest(path: Path) -> None:
    """Check that a checkpoint is as it was written, without torch.

    Raises:
        CheckpointError: missing, truncated or altered.
    """
    _read(path)


def _is_whole(path: Path) -> bool:
    try:
        check_digest(path)
    except CheckpointError:
        return False
    return True


def _read(path: Path) -> bytes:
    digest = _digest_path(path)
    try:
        content = read_file(path)
        if not digest.is_file():
            raise CheckpointError(f"{path} has no digest {digest.name} beside it, so it may be incomplete")
        expected = digest.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if expected != hashlib.sha256(content).hexdigest():
        raise CheckpointError(f"{path} does not match its digest: it is truncated or altered ({len(content)} bytes)")
    return content


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")
