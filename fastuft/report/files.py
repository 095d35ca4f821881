"""Reading the files of a run: metrics.jsonl, summary.json, config.yaml, eval.json, eval_arrays.npz."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastuft.names import printable
from fastuft.report.checked import (
    ARRAYS,
    Arrays,
    checked_arrays,
    checked_evaluation,
    checked_metrics,
    checked_summary,
)
from fastuft.runfolder import RunFolder, json_lines, read_json

_MAX_ARRAYS = 1 << 30  # unpacked bytes of eval_arrays.npz; an evaluation writes a few megabytes
_MAX_COMPLAINTS = 5  # complaints about one file that are shown one by one

Content = TypeVar("Content")


@dataclass(frozen=True)
class RunFiles:
    """The files of one run; what is absent or damaged is empty.

    Args:
        name: its name in the report; runs with the same name are seeds of one arm.
        folder: its folder.
        metrics: rows of metrics.jsonl.
        summary: summary.json.
        config: text of config.yaml.
        evaluation: eval.json.
        arrays: eval_arrays.npz.
        damaged: what could not be used, one sentence each.
    """

    name: str
    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    evaluation: dict[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)
    damaged: tuple[str, ...] = ()

    def series(self, key: str, kind: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """(steps [N], values [N]) of one logged quantity, without the rows that lack it."""
        rows = [row for row in self.metrics if row.get("kind") == kind and isinstance(row.get(key), int | float)]
        return np.array([row["step"] for row in rows], dtype=float), np.array([row[key] for row in rows], dtype=float)


def load_run(name: str, folder: Path | str | Sequence[Path | str]) -> RunFiles:
    """The files of one run, from its folder or from several (if training and evaluation are in separate folders).

    Each file is looked for in every folder and in its sub-folder ``eval``; the first one found counts. The intact parts
    of a damaged file are used, and ``damaged`` says which parts are not.

    Raises:
        ValueError: no folder holds any run file.
    """
    folders = [Path(f) for f in ([folder] if isinstance(folder, str | Path) else folder)]
    searched = [RunFolder(path) for f in folders for path in (f, f / "eval")]
    if not any(file.is_file() for run in searched for file in run.report_files):
        names = ", ".join(file.name for file in searched[0].report_files)
        listed = ", ".join(printable(str(folder)) for folder in folders)
        raise ValueError(f"run {printable(name)!r}: {listed} has none of {names}; name a run or evaluation folder")
    damaged: list[str] = []

    def read(
        file: Callable[[RunFolder], Path], reader: Callable[[Path], tuple[Content, list[str]]], empty: Content
    ) -> Content:
        path = next((file(run) for run in searched if file(run).is_file()), None)
        if path is None:
            return empty
        try:
            content, complaints = reader(path)
        except Exception as error:  # whatever a damaged file makes its reader raise
            content, complaints = empty, [_reason(error, path)]
        damaged.extend(_named(path, complaints))
        return content

    return RunFiles(
        printable(name),
        folders[0],
        metrics=read(lambda run: run.metrics_file, _read_metrics, []),
        summary=read(lambda run: run.summary_file, lambda path: checked_summary(read_json(path)), {}),
        config=read(lambda run: run.config_file, _read_text, ""),
        evaluation=read(lambda run: run.evaluation_file, lambda path: checked_evaluation(read_json(path)), {}),
        arrays=read(lambda run: run.arrays_file, _read_arrays, {}),
        damaged=tuple(damaged),
    )


def _reason(error: Exception, path: Path) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.removeprefix(f"{path} ") if text.startswith(f"{path} ") else f"cannot be read ({text})"


def _named(path: Path, complaints: Sequence[str]) -> list[str]:
    """Complaints with the name of their file: the first few, then how many more there are."""
    rest = len(complaints) - _MAX_COMPLAINTS
    shown = [*complaints[:_MAX_COMPLAINTS], *([f"{rest} more"] if rest > 0 else [])]
    return [f"{printable(str(path))}: {printable(text)}" for text in shown]


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    rows, complaints = json_lines(path)
    kept, more = checked_metrics(rows)
    return kept, [*(f"line {text.removeprefix(f'{path}:')}" for text in complaints), *more]


def _read_text(path: Path) -> tuple[str, list[str]]:
    return path.read_text(encoding="utf-8", errors="backslashreplace"), []


def _read_arrays(path: Path) -> tuple[Arrays, list[str]]:
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > _MAX_ARRAYS:
        raise ValueError(f"{size:,} bytes when unpacked; an evaluation writes less than {_MAX_ARRAYS:,}")
    loaded: Arrays = {}
    complaints = []
    with np.load(path, allow_pickle=False) as file:
        for key in ARRAYS & set(file.files):
            try:
                loaded[key] = file[key]
            except Exception as error:  # as above; one damaged array does not affect the others
                complaints.append(f"{key} {_reason(error, path)}")
    checked, more = checked_arrays(loaded)
    return checked, [*complaints, *more]
