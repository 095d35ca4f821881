"""The folder of one run: the names of its files, and which of them holds the weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastuft.atomic import write_whole
from fastuft.runfolder.checkpoints import CheckpointError, Checkpoints, check_digest
from fastuft.runfolder.lock import RunLock
from fastuft.runfolder.progress import Progress
from fastuft.runfolder.records import json_lines, read_file, read_json, write_json
from fastuft.runfolder.sealed import damage


@dataclass(frozen=True)
class RunFolder:
    """What one run writes, and where.

    Args:
        path: the folder, which need not exist.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """The configuration, YAML; what was left to the program is replaced with what it chose."""
        return self.path / "config.yaml"

    @property
    def given_file(self) -> Path:
        """The configuration as it was given, YAML."""
        return self.path / "config_given.yaml"

    @property
    def manifest_file(self) -> Path:
        """The training images."""
        return self.path / "manifest.json"

    @property
    def metrics_file(self) -> Path:
        """Rows of metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        """The outcome of the run."""
        return self.path / "summary.json"

    @property
    def stopped_file(self) -> Path:
        """Exists while a run that was asked to stop waits to be resumed."""
        return self.path / "stopped.json"

    @property
    def backbone_file(self) -> Path:
        """The exported backbone."""
        return self.path / "backbone.safetensors"

    @property
    def last_file(self) -> Path:
        """The backbone of the last step, if the exported one is from another step."""
        return self.path / "last.safetensors"

    @property
    def start_file(self) -> Path:
        """The backbone that the run started from, if a verdict may fall back to it."""
        return self.path / "start.safetensors"

    def judged_file(self, step: int) -> Path:
        """The backbone of the best step so far, if a verdict selects it."""
        return self.path / f"judged_{step:08d}.safetensors"

    def judged_files(self) -> list[Path]:
        """The existing ones: one, except for the moment in which a better one is written."""
        return sorted(self.path.glob("judged_*.safetensors"))

    @property
    def start_features_file(self) -> Path:
        """The features of a fixed sample at the start of the run."""
        return self.path / "start_features.safetensors"

    @property
    def evaluation_file(self) -> Path:
        """Figures of an evaluation of the run."""
        return self.path / "eval.json"

    @property
    def arrays_file(self) -> Path:
        """The arrays of an evaluation that the report plots."""
        return self.path / "eval_arrays.npz"

    @property
    def report_files(self) -> tuple[Path, ...]:
        """The files that a report reads; each may be missing."""
        return (self.metrics_file, self.summary_file, self.config_file, self.evaluation_file, self.arrays_file)

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints from which the run can resume."""
        return Checkpoints(self.path / "checkpoints")

    @property
    def has_weights(self) -> bool:
        """Whether training has written anything that another run must not overwrite."""
        exported = (self.backbone_file, self.last_file, *self.judged_files())
        return any(file.exists() for file in exported) or bool(self.checkpoints.all())

    def write_config(self, config: Mapping[str, object], given: Mapping[str, object]) -> None:
        """Write the configuration as it is used and as it was given, both as nested mappings of plain values.

        Raises:
            OSError: the file could not be written.
        """
        import yaml

        for file, values in ((self.given_file, given), (self.config_file, config)):
            write_whole(file, yaml.safe_dump(dict(values), sort_keys=False).encode())

    def read_config(self) -> dict[str, Any]:
        """The configuration as it is used, as nested mappings; empty if there is none.

        Raises:
            ValueError: damaged.
        """
        return _read_yaml(self.config_file)

    def read_given(self) -> dict[str, Any]:
        """The configuration as it was given, as nested mappings; empty if there is none.

        Raises:
            ValueError: damaged.
        """
        return _read_yaml(self.given_file)

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write the outcome of the run.

        Raises:
            OSError: the file could not be written.
        """
        write_json(self.summary_file, summary)

    def read_summary(self) -> dict[str, Any]:
        """The outcome of the run; empty if it has not ended.

        Raises:
            ValueError: damaged.
        """
        return read_json(self.summary_file) if self.summary_file.exists() else {}

    def write_stopped(self, signal: str, progress: Progress) -> None:
        """Record that the run was asked to stop, by which signal and at which step, for the scheduler that started it.

        Raises:
            OSError: the file could not be written.
        """
        write_json(self.stopped_file, {"signal": signal, "step": progress.global_step, "epoch": progress.epoch})

    def lock(self) -> RunLock:
        """A lock that holds the folder for this process; no other run may work in it meanwhile."""
        return RunLock(self.path, self.path / "run.lock")

    def write_metrics(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Replace all rows with these.

        Raises:
            OSError: the file could not be written.
        """
        write_whole(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics that are whole."""
        if not self.metrics_file.exists():
            return []
        rows, complaints = json_lines(self.metrics_file)
        for complaint in complaints:
            warnings.warn(complaint, stacklevel=2)
        return [row for row in rows if isinstance(row.get("step"), int)]

    def weights_file(self, *, backbone_first: bool = False) -> Path:
        """The file to take the run's weights from; damaged ones are skipped with a warning.

        If a verdict selected the exported backbone, it comes before the newest checkpoint.

        Args:
            backbone_first: prefer the exported backbone to the newest checkpoint, which also has the head.

        Raises:
            CheckpointError: the folder has no file with weights, or none that is whole.
        """
        sources = (self._whole_checkpoint, self._whole_backbone)
        reasons: list[str] = []
        for find in reversed(sources) if backbone_first or self.last_file.exists() else sources:
            file, damaged = find()
            reasons += damaged
            if file is not None:
                for reason in reasons:
                    warnings.warn(f"{reason}; {file} is used instead", stacklevel=2)
                return file
        if reasons:
            raise CheckpointError(f"{str(self.path)!r} has no undamaged weights: {reasons[0]}; copy the run again")
        raise CheckpointError(
            f"{str(self.path)!r} is a folder without checkpoints; name a run folder or a checkpoint file"
        )

    def _whole_checkpoint(self) -> tuple[Path | None, tuple[str, ...]]:
        newest = self.checkpoints.newest(check_digest)
        return newest.path, newest.reasons

    def _whole_backbone(self) -> tuple[Path | None, tuple[str, ...]]:
        if not self.backbone_file.exists():
            return None, ()
        found = damage(self.backbone_file)
        return (self.backbone_file, ()) if found is None else (None, (found,))


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.exists():
        return {}
    try:
        values = yaml.safe_load(read_file(path).decode())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged ({reason}); restore it or use another folder") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged (not a mapping); restore it or use another folder")
    return values
