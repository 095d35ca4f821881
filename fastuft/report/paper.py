"""Reproduced figures compared with those of the paper (Li et al. 2021, Tables 1-6 and the text)."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastuft.report.render import render, write_page
from fastuft.report.tables import NONE, Figure, Format, Table
from fastuft.runfolder import read_json_lines

KEYS = ("table", "pretraining", "backbone", "method", "dataset", "metric")
Key = tuple[str, str, str, str, str, str]

# Inconsistencies within the paper.
SLIPS = (
    "Averages are recomputed from the cells, because the averages printed in the paper's Table 3 are not the means of "
    "their rows (it prints 38.39 where the cells give 34.51).",
    "One cell, unsup_S on Food-101 with two shots, is 15.80 in Table 2 and 15.84 in Table 6.",
    "Two gains printed in Table 2 differ from its cells: +17.88 where they give 17.90, and +9.14 where they give 11.84.",
    "The text quotes clustering with replaying as 28.14 (ImageNet) and 56.11 (Pet); 56.11 is also the figure of the full "
    "method in Table 2, so the quoted pair may include mixing.",
    "Section 3 of the paper swaps the sizes of Caltech101 and Pet.",
)


@dataclass(frozen=True)
class Comparison:
    """One cell: ``ours`` and ``paper`` in per cent, None if there is no figure; ``runs`` are its run folders."""

    key: Key
    ours: Figure | None
    paper: float | None
    runs: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        """Our figure minus the paper's, in percentage points."""
        return None if self.ours is None or self.paper is None else self.ours.mean - self.paper


def paper_figures() -> dict[Key, float]:
    """Every figure in the paper's tables and text, in per cent, by its ``KEYS``."""
    text = (resources.files("fastuft.report") / "paper_tables.csv").read_text(encoding="utf-8")
    return {tuple(row[k] for k in KEYS): float(row["value"]) for row in csv.DictReader(text.splitlines())}  # type: ignore[misc]


def read_results(paths: Path | str | Sequence[Path | str]) -> list[dict[str, Any]]:
    """The checked rows of one or several results.jsonl files.

    Each row has table, pretraining, backbone, method, dataset, metric (as in the paper's figures), trial (int), value
    (per cent) and run (a folder, absolute or relative to the current directory). A (cell, trial) may occur only once.

    Raises:
        ValueError: a row is malformed or repeated; the message names file and line.
    """
    seen: dict[tuple[Any, ...], str] = {}
    rows = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for number, row in enumerate(read_json_lines(Path(path)), 1):
            where = f"{path}: row {number}"
            missing = [key for key in (*KEYS, "trial", "value") if key not in row]
            if missing:
                raise ValueError(f"{where} lacks {', '.join(missing)}; a row has {', '.join(KEYS)}, trial, value, run")
            value = row["value"]
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
                raise ValueError(f"{where} has value={value!r}; allowed: a number from 0 to 100, in per cent")
            cell = (*(str(row[key]) for key in KEYS), row["trial"])
            if cell in seen:
                raise ValueError(f"{where} repeats {' '.join(map(str, cell))} from {seen[cell]}; remove one of them")
            seen[cell] = where
            rows.append(row)
    return rows


def _order(key: Key, positions: dict[Key, int]) -> tuple[Any, ...]:
    return (key[0], positions.get(key, len(positions)), key)


def compare_with_paper(rows: Iterable[dict[str, Any]], *, missing: bool = True) -> list[Comparison]:
    """Mean and spread over trials of every cell, with the paper's figure, in the paper's order.

    Args:
        rows: rows of results.jsonl.
        missing: also list cells without a result, in those of the paper's tables that have any.
    """
    values: dict[Key, list[tuple[Any, float, str]]] = {}
    for row in rows:
        key: Key = tuple(str(row[k]) for k in KEYS)  # type: ignore[assignment]
        values.setdefault(key, []).append((row["trial"], float(row["value"]), str(row.get("run", ""))))
    paper = paper_figures()
    tables = {key[0] for key in values}
    keys = set(values) | ({key for key in paper if key[0] in tables} if missing else set())
    positions = {key: i for i, key in enumerate(paper)}
    result = []
    for key in sorted(keys, key=lambda k: _order(k, positions)):
        trials = sorted(values.get(key, []), key=lambda trial: str(trial[0]))
        ours = Figure.of([value for _, value, _ in trials]) if trials else None
        runs = tuple(dict.fromkeys(run for _, _, run in trials if run))
        result.append(Comparison(key, ours, paper.get(key), runs))
    return result + _averages(result)


def _averages(cells: Sequence[Comparison]) -> list[Comparison]:
    """Means over data sets, if the paper and we have all of a row's figures (at least two); ours has no spread."""
    rows: dict[tuple[str, ...], list[Comparison]] = {}
    for cell in cells:
        if cell.key[0] != "text":
            rows.setdefault((*cell.key[:4], cell.key[5]), []).append(cell)
    result = []
    for (table, pretraining, backbone, method, metric), row in rows.items():
        ours = [cell.ours.mean for cell in row if cell.ours]
        paper = [cell.paper for cell in row if cell.paper is not None]
        if len(row) > 1 and len(ours) == len(paper) == len(row):
            key = (table, pretraining, backbone, method, "average", metric)
            result.append(Comparison(key, Figure(sum(ours) / len(ours)), sum(paper) / len(paper)))
    return result


def comparison_table(
    cells: Sequence[Comparison], format: Format = "text", links: Mapping[str, str] | None = None
) -> str:
    """All cells, one per row: mean, standard deviation over trials, number of trials, the paper's figure, the difference.

    Args:
        cells: see :func:`compare_with_paper`.
        format: text; markdown, whose means link to their run folders; csv, which has these folders as a column.
        links: the address of each run folder; by default the folder itself.
    """
    headers = [*KEYS, "mean", "std", "trials", "paper", "difference"]
    rows = []
    for cell in cells:
        ours, difference = cell.ours, cell.difference
        addresses = [(links or {}).get(run, run) for run in cell.runs]
        figures = [
            f"{ours.mean:.2f}" if ours else NONE,
            f"{ours.std:.2f}" if ours and ours.std is not None else NONE,
            str(ours.count) if ours else NONE,
            f"{cell.paper:.2f}" if cell.paper is not None else NONE,
            f"{difference:+.2f}" if difference is not None else NONE,
        ]
        if format == "csv":
            figures = [*("" if text == NONE else text for text in figures), ";".join(addresses)]
        if format == "markdown" and addresses:
            figures[0] = f"[{figures[0]}](<{addresses[0]}>)"
        rows.append([*cell.key, *figures])
    return Table([*headers, "runs"] if format == "csv" else headers, rows, names=len(KEYS)).show(format)


@dataclass(frozen=True)
class Section:
    """One of the paper's tables: methods and metrics against data sets."""

    title: str
    datasets: list[str]
    rows: list[tuple[str, str, list[Comparison | None]]]


def sections(cells: Sequence[Comparison]) -> list[Section]:
    """Cells arranged as in the paper's tables."""
    result = []
    for table in dict.fromkeys(cell.key[0] for cell in cells):
        mine = [cell for cell in cells if cell.key[0] == table]
        names = dict.fromkeys(cell.key[4] for cell in mine if cell.key[4] != "average")
        datasets = [*names, *(["average"] if any(cell.key[4] == "average" for cell in mine) else [])]
        found = {(c.key[1], c.key[2], c.key[3], c.key[5], c.key[4]): c for c in mine}
        networks = dict.fromkeys(key[:2] for key in found)
        title = "Figures in the text" if table == "text" else f"Table {table}"
        if len(networks) == 1:
            title += f" · {', '.join(next(iter(networks)))}"
        rows = [
            (
                row[2] if len(networks) == 1 else f"{row[2]} ({row[0]}, {row[1]})",
                row[3],
                [found.get((*row, dataset)) for dataset in datasets],
            )
            for row in dict.fromkeys(key[:4] for key in found)
        ]
        result.append(Section(title, datasets, rows))
    return result


def write_comparison(
    folder: Path | str,
    results: Path | str | Sequence[Path | str],
    *,
    stem: str = "comparison",
    title: str = "Reproduction compared with the paper",
    notes: Sequence[str] = (),
    missing: bool = True,
) -> list[Comparison]:
    """Write the comparison as .txt, .csv, .md and .html into ``folder`` from results.jsonl files.

    Args:
        folder: the folder to write to; links to run folders are relative to it.
        results: one or several results.jsonl files; see :func:`read_results`.
        stem: name of the files, without suffix.
        title: heading of the page.
        notes: sentences shown above the tables, such as the scale of the grid.
        missing: also show the paper's cells that have no result yet.

    Raises:
        ValueError: the files have no results.
    """
    rows = read_results(results)
    if not rows:
        raise ValueError(f"{results} has no results yet; run `fastuft reproduce` first")
    cells = compare_with_paper(rows, missing=missing)
    root = Path(folder)
    links = {run: quote(os.path.relpath(run, root)) for cell in cells for run in cell.runs}
    said = "".join(f"{note}\n\n" for note in notes)
    files: dict[str, tuple[Format, str]] = {"txt": ("text", said), "csv": ("csv", ""), "md": ("markdown", said)}
    for suffix, (format, before) in files.items():
        text = before + comparison_table(cells, format, links)
        write_page(root / f"{stem}.{suffix}", text)
    page = render("comparison.html", title=title, notes=notes, sections=sections(cells), links=links, slips=SLIPS)
    write_page(root / f"{stem}.html", page)
    return cells
