"""Tables of figures: one structure, shown as text, Markdown, CSV or (on the page) HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from fastuft.nested import lookup
from fastuft.report.files import RunFiles, load_run

Format = Literal["text", "markdown", "csv"]
Runs = Sequence[RunFiles | tuple[str, Path | str]]
NONE = "–"
ACCURACIES = ("retrieval %", "clustering %", "source clustering %")  # what labels measure before and after


@dataclass(frozen=True)
class Figure:
    """A mean with its spread; ``std`` is None if there is only one value."""

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
    """Headers and cells, all of them text; the first ``names`` columns are names, the rest are numbers."""

    headers: list[str]
    rows: list[list[str]]
    names: int = 1

    def text(self) -> str:
        """Columns aligned for a terminal: names left, numbers right."""
        widths = [max(len(row[i]) for row in [self.headers, *self.rows]) for i in range(len(self.headers))]

        def line(cells: Sequence[str]) -> str:
            parts = (
                c.ljust(w) if i < self.names else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join(parts).rstrip()

        return "\n".join([line(self.headers), "  ".join("-" * w for w in widths), *map(line, self.rows)]) + "\n"

    def markdown(self) -> str:
        """A Markdown table; vertical bars in cells are escaped."""

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
        """The table in one of the formats.

        Raises:
            ValueError: another format.
        """
        shown: dict[str, Callable[[], str]] = {"text": self.text, "markdown": self.markdown, "csv": self.csv}
        if format not in shown:
            raise ValueError(f"format={format!r} is not allowed; choose one of {', '.join(map(repr, shown))}")
        return shown[format]()


def as_runs(runs: Runs) -> list[RunFiles]:
    """Loaded runs, from (name, folder) pairs or from runs that are already loaded."""
    if not runs:
        raise ValueError("runs is empty; name at least one run folder")
    return [run if isinstance(run, RunFiles) else load_run(*run) for run in runs]


def arms(runs: Sequence[RunFiles]) -> dict[str, list[RunFiles]]:
    """Runs by name, in order of first mention; runs with the same name are seeds of one arm."""
    grouped: dict[str, list[RunFiles]] = {}
    for run in runs:
        grouped.setdefault(run.name, []).append(run)
    return grouped


def figure(runs: Sequence[RunFiles], *keys: str) -> Figure | None:
    """A figure of eval.json over the runs of an arm; its spread is over runs, or over the trials of a single run."""
    found = [value for run in runs if (value := lookup(run.evaluation, *keys)) is not None]
    found = [value for value in found if not isinstance(value, dict) or "mean" in value]
    if not found:
        return None
    if len(found) == 1 and isinstance(found[0], dict):
        return Figure(found[0]["mean"], found[0]["std"], len(found[0]["trials"]))
    return Figure.of([value["mean"] if isinstance(value, dict) else value for value in found])


@dataclass(frozen=True)
class Column:
    """One figure of every arm.

    Args:
        header: the heading of the column.
        get: the figure of an arm, or None.
        digits: digits after the decimal point.
        kind: accuracy, for which higher is better; reference, the accuracy of another network for comparison; or change,
            measured without labels.
    """

    header: str
    get: Callable[[Sequence[RunFiles]], Figure | None]
    digits: int
    kind: Literal["accuracy", "reference", "change"]


def _shots(runs: Sequence[RunFiles], *keys: str) -> list[int]:
    """The values of K for which any run has figures below ``keys`` of its evaluation, in order."""
    return sorted({int(k) for run in runs for k in lookup(run.evaluation, *keys) or ()})


def _columns(runs: Sequence[RunFiles]) -> list[Column]:
    """The columns for which any run has a figure."""

    def share(header: str, *keys: str, kind: Literal["accuracy", "reference", "change"] = "accuracy") -> Column:
        def get(group: Sequence[RunFiles]) -> Figure | None:
            value = figure(group, *keys)
            return value.scaled(100) if value else None

        return Column(header, get, 1, kind)

    def plain(header: str, *keys: str) -> Column:
        return Column(header, lambda group: figure(group, *keys), 3, "change")

    means, shots, semi = (_shots(runs, name) for name in ("class_means", "fewshot", "fixmatch"))
    columns = [
        share("retrieval %", "retrieval"),
        share("clustering %", "clustering"),
        *(share(f"{k}-shot means %", "class_means", str(k)) for k in means),
        # If test classes are equally large, mean class accuracy equals top-1 accuracy; eval.json has both.
        *(share(f"{k}-shot %", "fewshot", str(k), "mean_class") for k in shots),
        *(share(f"FixMatch {k} %", "fixmatch", str(k), "mean_class") for k in semi),
        share("source clustering %", "forgetting", "after"),
        share("source before %", "forgetting", "before", kind="reference"),
        plain("alignment", "label_free", "alignment"),
        plain("uniformity", "label_free", "uniformity"),
        plain("effective rank", "label_free", "effective_rank"),
        plain("LiDAR", "label_free", "lidar"),
        share("neighbors kept %", "label_free", "neighbor_overlap", kind="change"),
        plain("target CKA", "label_free", "target_drift", "linear_cka"),
        plain("source CKA", "source_drift", "linear_cka"),
        plain("source cosine", "source_drift", "mean_cosine"),
    ]
    grouped = arms(runs).values()
    return [column for column in columns if any(column.get(group) for group in grouped)]


def _side_by_side(groups: dict[str, list[RunFiles]], columns: Sequence[Column]) -> Table | None:
    """A row per arm that has any of these figures; None if no arm has."""
    rows = []
    for name, group in groups.items():
        found = [column.get(group) for column in columns]
        if any(found):
            rows.append([name, *(f.text(c.digits) if f else NONE for f, c in zip(found, columns, strict=True))])
    return Table(["run", *(column.header for column in columns)], rows) if rows else None


def accuracy_table(runs: Sequence[RunFiles]) -> Table | None:
    """How good each arm is, as far as labels can tell."""
    return _side_by_side(arms(runs), [column for column in _columns(runs) if column.kind != "change"])


def change_table(runs: Sequence[RunFiles]) -> Table | None:
    """The geometry of each arm's features and how they changed, which needs no labels."""
    return _side_by_side(arms(runs), [column for column in _columns(runs) if column.kind == "change"])


def before_after_table(runs: Sequence[RunFiles]) -> Table | None:
    """Each metric known before and after, with the difference; one row per arm and metric, None if there are none."""
    compared: list[tuple[str, float, int, tuple[str, ...], tuple[str, ...]]] = [
        (ACCURACIES[0], 100, 1, ("before", "retrieval"), ("retrieval",)),
        (ACCURACIES[1], 100, 1, ("before", "clustering"), ("clustering",)),
        (ACCURACIES[2], 100, 1, ("forgetting", "before"), ("forgetting", "after")),
        ("alignment", 1, 3, ("label_free", "before", "alignment"), ("label_free", "alignment")),
        ("uniformity", 1, 3, ("label_free", "before", "uniformity"), ("label_free", "uniformity")),
        ("effective rank", 1, 1, ("label_free", "before", "effective_rank"), ("label_free", "effective_rank")),
        ("LiDAR", 1, 1, ("label_free", "before", "lidar"), ("label_free", "lidar")),
        ("view agreement %", 100, 1, ("label_free", "before", "view_agreement"), ("label_free", "view_agreement")),
    ]
    means, shots = (_shots(runs, "before", name) for name in ("class_means", "fewshot"))
    compared[2:2] = [
        *((f"{k}-shot means %", 100, 1, ("before", "class_means", str(k)), ("class_means", str(k))) for k in means),
        *(
            (f"{k}-shot %", 100, 1, ("before", "fewshot", str(k), "mean_class"), ("fewshot", str(k), "mean_class"))
            for k in shots
        ),
    ]
    rows = []
    for name, group in arms(runs).items():
        for header, factor, digits, then, now in compared:
            before, after = figure(group, *then), figure(group, *now)
            if before is not None and after is not None:
                values = (factor * before.mean, factor * after.mean)
                change = f"{values[1] - values[0]:+.{digits}f}"
                rows.append([name, header, *(f"{value:.{digits}f}" for value in values), change])
    return Table(["run", "metric", "before", "after", "difference"], rows) if rows else None


def best_cells(runs: Sequence[RunFiles], shown: Table) -> set[tuple[int, int]]:
    """(row, column) of the highest printed mean in each column of accuracies."""
    best = set()
    for column in _columns(runs):
        if column.kind != "accuracy" or column.header not in shown.headers:
            continue
        j = shown.headers.index(column.header)
        means = {i: float(row[j].split()[0]) for i, row in enumerate(shown.rows) if row[j] != NONE}
        if len(means) > 1:
            best |= {(i, j) for i, mean in means.items() if mean == max(means.values())}
    return best


def table(runs: Runs, format: Format = "text") -> str:
    """The arms side by side: one row per name, with mean and spread over the runs with that name or over a run's trials.

    Text and Markdown show accuracies first, then changes measured without labels, then before and after side by side if both
    are known; CSV has everything in one table.

    Args:
        runs: (name, folder) pairs or loaded runs.
        format: text, markdown or csv.
    """
    loaded = as_runs(runs)
    everything = _side_by_side(arms(loaded), _columns(loaded))
    if everything is None:
        return "none of the runs has figures yet; evaluate them with `fastuft eval`\n"
    if format == "csv":
        return everything.csv()
    tables = (accuracy_table(loaded), change_table(loaded), before_after_table(loaded))
    return "\n".join(shown.show(format) for shown in tables if shown)
