"""Tables of figures: one structure, shown as text, Markdown, CSV or (by the page) HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from fastuft.report.files import RunFiles, load_run

Format = Literal["text", "markdown", "csv"]
Runs = Sequence[RunFiles | tuple[str, Path | str]]
NONE = "–"


@dataclass(frozen=True)
class Figure:
    """A mean with its spread; ``std`` None when there is one value only."""

    mean: float
    std: float | None = None
    count: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Mean and sample standard deviation of ``values``."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    def scaled(self, factor: float) -> Figure:
        return Figure(self.mean * factor, None if self.std is None else self.std * factor, self.count)

    def text(self, digits: int = 1) -> str:
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Table:
    """Headers and cells, all text; the first ``names`` columns are names, the rest are numbers."""

    headers: list[str]
    rows: list[list[str]]
    names: int = 1

    def text(self) -> str:
        """Columns aligned for a terminal: names to the left, numbers to the right."""
        widths = [max(len(row[i]) for row in [self.headers, *self.rows]) for i in range(len(self.headers))]

        def line(cells: Sequence[str]) -> str:
            parts = (
                c.ljust(w) if i < self.names else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join(parts).rstrip()

        return "\n".join([line(self.headers), "  ".join("-" * w for w in widths), *map(line, self.rows)]) + "\n"

    def markdown(self) -> str:
        """A Markdown table; bars in cells are escaped."""

        def line(cells: Sequence[str]) -> str:
            return (
                "| " + " | ".join(c.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
            )

        rule = ["---" if i < self.names else "---:" for i in range(len(self.headers))]
        return "\n".join([line(self.headers), line(rule), *map(line, self.rows)]) + "\n"

    def csv(self) -> str:
        """Comma-separated values with a header line."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.headers)
        writer.writerows(self.rows)
        return buffer.getvalue()

    def show(self, format: Format) -> str:
        """The table in one of the formats."""
        shown: dict[str, Callable[[], str]] = {"text": self.text, "markdown": self.markdown, "csv": self.csv}
        if format not in shown:
            raise ValueError(f"format={format!r} is not allowed; choose one of {', '.join(map(repr, shown))}")
        return shown[format]()


def as_runs(runs: Runs) -> list[RunFiles]:
    """Loaded runs, from (name, folder) pairs or runs already loaded."""
    if not runs:
        raise ValueError("runs is empty; name at least one run folder")
    return [run if isinstance(run, RunFiles) else load_run(*run) for run in runs]


def arms(runs: Sequence[RunFiles]) -> dict[str, list[RunFiles]]:
    """Runs by name, in order of first mention; several runs of one name are seeds of one arm."""
    grouped: dict[str, list[RunFiles]] = {}
    for run in runs:
        grouped.setdefault(run.name, []).append(run)
    return grouped


def lookup(values: Any, *keys: str) -> Any:
    """Nested value or None."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def figure(runs: Sequence[RunFiles], *keys: str) -> Figure | None:
    """A figure of eval.json over the runs of an arm: spread over runs, or over the trials of a single run."""
    found = [value for run in runs if (value := lookup(run.evaluation, *keys)) is not None]
    if not found:
        return None
    if len(found) == 1 and isinstance(found[0], dict):
        return Figure(found[0]["mean"], found[0]["std"], len(found[0]["trials"]))
    return Figure.of([value["mean"] if isinstance(value, dict) else value for value in found])


Column = tuple[str, Callable[[Sequence[RunFiles]], Figure | None], int, bool | None]


def _columns(runs: Sequence[RunFiles]) -> list[Column]:
    """(header, figure of an arm, digits, whether higher is better) of everything that any run has."""

    def evaluated(header: str, *keys: str, percent: bool = True, digits: int = 1, up: bool | None = True) -> Column:
        def get(group: Sequence[RunFiles]) -> Figure | None:
            value = figure(group, *keys)
            return value.scaled(100) if value and percent else value

        return header, get, digits, up

    shots = sorted({int(k) for run in runs for k in lookup(run.evaluation, "fewshot") or ()})
    semi = sorted({int(k) for run in runs for k in lookup(run.evaluation, "fixmatch") or ()})
    columns = [
        evaluated("retrieval %", "retrieval"),
        evaluated("clustering %", "clustering"),
        # Where test classes are equally large, mean class accuracy is top-1 accuracy; eval.json holds both.
        *(evaluated(f"{k}-shot %", "fewshot", str(k), "mean_class") for k in shots),
        *(evaluated(f"FixMatch {k} %", "fixmatch", str(k), "mean_class") for k in semi),
        evaluated("source clustering %", "forgetting", "after"),
        evaluated("source before %", "forgetting", "before", up=None),
        evaluated("alignment", "label_free", "alignment", percent=False, digits=3, up=None),
        evaluated("uniformity", "label_free", "uniformity", percent=False, digits=3, up=None),
        evaluated("neighbours kept %", "label_free", "neighbour_overlap", up=None),
        evaluated("target CKA", "label_free", "target_drift", "linear_cka", percent=False, digits=3, up=None),
        evaluated("source CKA", "source_drift", "linear_cka", percent=False, digits=3, up=None),
        evaluated("source cosine", "source_drift", "mean_cosine", percent=False, digits=3, up=None),
    ]
    grouped = arms(runs).values()
    return [column for column in columns if any(column[1](group) for group in grouped)]


def figures_table(runs: Sequence[RunFiles]) -> tuple[Table, set[tuple[int, int]]]:
    """The arms side by side, and the (row, column) cells of the best mean in columns where higher is better."""
    columns, groups = _columns(runs), arms(runs)
    cells = [[get(group) for _, get, _, _ in columns] for group in groups.values()]
    best = set()
    for j, (_, _, digits, up) in enumerate(columns):
        means = [round(row[j].mean, digits) if row[j] else -float("inf") for row in cells]  # type: ignore[union-attr]
        if up and len(groups) > 1:
            best |= {(i, j + 1) for i, mean in enumerate(means) if mean == max(means)}
    rows = [
        [name, *(c.text(columns[j][2]) if c else NONE for j, c in enumerate(row))]
        for name, row in zip(groups, cells, strict=True)
    ]
    return Table(["run", *(column[0] for column in columns)], rows), best


def table(runs: Runs, format: Format = "text") -> str:
    """The arms side by side: one row a name, mean and spread over runs of that name or over a run's trials.

    Args:
        runs: (name, folder) pairs or loaded runs.
        format: text, markdown or csv.
    """
    return figures_table(as_runs(runs))[0].show(format)
