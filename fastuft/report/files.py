"""Reading what a run leaves behind: metrics.jsonl, summary.json, config.yaml, eval.json, eval_arrays.npz."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastuft.names import printable
from fastuft.runfolder import RunFolder, read_json, read_json_lines


@dataclass(frozen=True)
class RunFiles:
    """The files of one run; what is absent is empty.

    Args:
        name: what the report calls it; runs of one name are seeds of one arm.
        folder: where it lies.
        metrics: rows of metrics.jsonl.
        summary: summary.json.
        config: text of config.yaml.
        evaluation: eval.json.
        arrays: eval_arrays.npz.
    """

    name: str
    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    evaluation: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def series(self, key: str, kind: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of one logged quantity, without rows that lack it or are not finite."""
        rows = [row for row in self.metrics if row.get("kind") == kind and isinstance(row.get(key), int | float)]
        steps = np.array([row["step"] for row in rows], dtype=float)
        values = np.array([row[key] for row in rows], dtype=float)
        finite = np.isfinite(values)
        return steps[finite], values[finite]


def load_run(name: str, folder: Path | str | Sequence[Path | str]) -> RunFiles:
    """The files of one run, from its folder or from several (training and evaluation apart).

    A file is looked for in each folder and in its sub-folder ``eval``; the first found counts.

    Raises:
        ValueError: no folder holds any run file, or a file is damaged.
    """
    folders = [Path(f) for f in ([folder] if isinstance(folder, str | Path) else folder)]
    places = [RunFolder(place) for f in folders for place in (f, f / "eval")]

    def first(file: Callable[[RunFolder], Path]) -> RunFolder | None:
        return next((place for place in places if file(place).is_file()), None)

    metrics, summary = first(lambda place: place.metrics_file), first(lambda place: place.summary_file)
    config, evaluation = first(lambda place: place.config_file), first(lambda place: place.evaluation_file)
    arrays = first(lambda place: place.arrays_file)
    if not (metrics or summary or config or evaluation or arrays):
        names = ", ".join(file.name for file in places[0].report_files)
        raise ValueError(
            f"run {name!r}: {', '.join(map(str, folders))} holds none of {names}; name a run or evaluation folder"
        )
    loaded: dict[str, np.ndarray] = {}
    if arrays:
        with np.load(arrays.arrays_file, allow_pickle=False) as file:
            loaded = {key: file[key] for key in file.files}
    return RunFiles(
        printable(name),
        folders[0],
        metrics=read_json_lines(metrics.metrics_file) if metrics else [],
        summary=summary.read_summary() if summary else {},
        config=config.config_file.read_text(encoding="utf-8") if config else "",
        evaluation=read_json(evaluation.evaluation_file) if evaluation else {},
        arrays=loaded,
    )
