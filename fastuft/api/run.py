"""What a training leaves, for further work in Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastuft.model import Backbone


@dataclass(frozen=True)
class Run:
    """A training that has ended.

    Wherever a call takes a checkpoint, it takes a run.

    Args:
        folder: the run folder.
        steps: steps done over the whole run.
        finished: False when a signal, Ctrl-C or ``max_steps`` ended it early; ``resume="auto"`` goes on.
        interrupted: name of the signal that ended it, or None.
        metrics: the last row of training metrics.
        bad_files: files that were skipped.
    """

    folder: Path
    steps: int
    finished: bool
    interrupted: str | None
    metrics: dict[str, Any]
    bad_files: int

    def __fspath__(self) -> str:
        return str(self.folder)

    def history(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl``: ``kind`` is train or watch, ``step`` counts from 1."""
        from fastuft.runfolder import RunFolder

        return RunFolder(self.folder).read_metrics()

    def backbone(self) -> Backbone:
        """The trained backbone, in eval mode on the CPU."""
        from fastuft.model import load_backbone

        return load_backbone(str(self.folder))
