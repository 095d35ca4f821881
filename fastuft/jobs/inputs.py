"""Checks of the inputs of a job."""

from __future__ import annotations

from pathlib import Path


def check_checkpoint(name: str, path: str) -> None:
    """Raise ValueError if ``path``, the value of the option ``name``, does not exist."""
    if not Path(path).exists():
        raise ValueError(
            f"{name}={path!r} does not exist; name a run folder or a checkpoint (.pth, .safetensors, .npz)"
        )
