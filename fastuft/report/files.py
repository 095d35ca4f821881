"""Reading what a run leaves behind: metrics.jsonl, summary.json, config.yaml, eval.json, eval_arrays.npz."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FILES = ("metrics.jsonl", "summary.json", "config.yaml", "eval.json", "eval_arrays.npz")


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


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line cut short by a crash is left out, any other bad line is an error."""
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number} is not JSON ({error.msg}); repair or remove that line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is no JSON object; each line holds one row of named values")
        rows.append(row)
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); run the step that writes it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object; run the step that writes it again")
    return value


def load_run(name: str, folder: Path | str | Sequence[Path | str]) -> RunFiles:
    """The files of one run, from its folder or from several (training and evaluation apart).

    A file is looked for in each folder and in its sub-folder ``eval``; the first found counts.

    Raises:
        ValueError: no folder holds any run file, or a file is damaged.
    """
    folders = [Path(f) for f in ([folder] if isinstance(folder, str | Path) else folder)]
    places = [place for f in folders for place in (f, f / "eval")]
    found = {file: next((p / file for p in places if (p / file).is_file()), None) for file in FILES}
    if not any(found.values()):
        listed = ", ".join(map(str, folders))
        raise ValueError(f"run {name!r}: {listed} holds none of {', '.join(FILES)}; name a run or evaluation folder")
    metrics, summary, config = found["metrics.jsonl"], found["summary.json"], found["config.yaml"]
    evaluation, arrays = found["eval.json"], found["eval_arrays.npz"]
    loaded: dict[str, np.ndarray] = {}
    if arrays:
        with np.load(arrays, allow_pickle=False) as file:
            loaded = {key: file[key] for key in file.files}
    return RunFiles(
        name,
        folders[0],
        metrics=read_json_lines(metrics) if metrics else [],
        summary=_read_json(summary) if summary else {},
        config=config.read_text(encoding="utf-8") if config else "",
        evaluation=_read_json(evaluation) if evaluation else {},
        arrays=loaded,
    )
