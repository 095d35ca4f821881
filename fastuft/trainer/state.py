"""Checkpoints: whole, checked, and never the last good one at risk."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import torch

from fastuft.atomic import remove_leftovers, write_whole

FORMAT = "fastuft checkpoint 1"
_NAME = re.compile(r"^step_(\d{8})\.pt$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or could not be written; the message says why and what is left."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return folder / f"step_{step:08d}.pt"


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of all checkpoints, newest first."""
    found = []
    for path in folder.glob("step_*.pt"):
        match = _NAME.match(path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep_last: int, keep_every: int) -> Path:
    """Write one checkpoint with its digest, then drop old ones.

    Args:
        folder: the run's checkpoints.
        step: steps done.
        state: tensors, numbers, strings, lists and dicts alone.
        keep_last: newest ones to keep.
        keep_every: also keep those whose step is a multiple of it; 0 keeps none.

    Raises:
        CheckpointError: the disk refused (full, gone); earlier checkpoints are as they were.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getbuffer()
    path = checkpoint_path(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        # The digest first: a kill between the two leaves a digest without a file, which nothing looks at.
        write_whole(_digest_path(path), hashlib.sha256(content).hexdigest().encode())
        write_whole(path, content)
    except OSError as error:
        last = next((str(p) for _, p in checkpoints(folder)), "none")
        raise CheckpointError(
            f"checkpoint {path} could not be written ({error.strerror}); the last good one is {last}. "
            "Free the disk and go on with resume=auto."
        ) from error
    for old_step, old in checkpoints(folder)[keep_last:]:
        if not (keep_every and old_step % keep_every == 0):
            old.unlink(missing_ok=True)
            _digest_path(old).unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read and check one checkpoint.

    Raises:
        CheckpointError: missing, truncated, altered, or not of this program.
    """
    if not path.is_file():
        raise CheckpointError(f"resume={str(path)!r} is not a file; name a checkpoint, or use resume=auto")
    content = path.read_bytes()
    digest = _digest_path(path)
    if not digest.is_file():
        raise CheckpointError(f"{path} has no digest {digest.name} beside it, so it may be incomplete")
    if digest.read_text().strip() != hashlib.sha256(content).hexdigest():
        raise CheckpointError(f"{path} does not match its digest: it is truncated or altered ({len(content)} bytes)")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a foreign file
        raise CheckpointError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this program; use it as init instead")
    return state


def newest_checkpoint(folder: Path) -> tuple[dict[str, Any] | None, Path | None, list[str]]:
    """(state, path, reasons): the newest checkpoint that is whole, and why newer ones were refused."""
    reasons: list[str] = []
    for _, path in checkpoints(folder):
        try:
            return load_checkpoint(path), path, reasons
        except CheckpointError as error:
            reasons.append(str(error))
    return None, None, reasons
