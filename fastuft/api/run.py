"""The result of a training, for further work in Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastuft.model import Backbone


@dataclass(frozen=True)
class Run:
    """A training that has ended.

    A run can be passed wherever a call takes a checkpoint.

    Args:
        folder: the run folder.
        steps: completed steps of the whole run.
        finished: False if a signal, Ctrl-C or ``max_steps`` ended it early; ``resume="auto"`` continues it.
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
        """The rows of ``metrics.jsonl``: ``kind`` is train, watch or look; ``step`` counts from 1."""
        from fastuft.runfolder import RunFolder

        return RunFolder(self.folder).read_metrics()

    def backbone(self) -> Backbone:
        """The trained backbone, in eval mode on the CPU."""
        from fastuft.model import load_backbone

        return load_backbone(str(self.folder))
