"""The self-contained report of one or several runs."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastuft.names import printable
from fastuft.nested import flattened, lookup
from fastuft.report.charts import curves, looks, maps, watched
from fastuft.report.files import RunFiles
from fastuft.report.render import render, write_page
from fastuft.report.tables import (
    ACCURACIES,
    NONE,
    Runs,
    Table,
    accuracy_table,
    arms,
    as_runs,
    before_after_table,
    best_cells,
    change_table,
    figure,
)

GALLERY_ROWS = 12


@dataclass(frozen=True)
class Thumb:
    """One picture of the gallery: the CSS class of its thumbnail, its caption and, with labels, whether it is right."""

    style: str
    caption: str
    right: bool | None = None


@dataclass(frozen=True)
class GalleryRow:
    """A query with its neighbors and, if they are known, its neighbors before training."""

    query: Thumb
    neighbors: list[Thumb]
    before: list[Thumb]


def _thumbnails(run: RunFiles, styles: dict[str, str]) -> list[tuple[str, str]]:
    """(CSS class, file name) of each thumbnail; identical pictures in several runs share one entry of ``styles``."""
    data, offsets = run.arrays["thumb_png"], run.arrays["thumb_offsets"]
    result = []
    for i, name in enumerate(run.arrays["thumb_names"]):
        png = data[offsets[i] : offsets[i + 1]].tobytes()
        style = f"t{hashlib.blake2b(png, digest_size=6).hexdigest()}"
        styles.setdefault(style, f"data:image/png;base64,{base64.b64encode(png).decode()}")
        result.append((style, printable(str(name))))
    return result


def _gallery(run: RunFiles, styles: dict[str, str]) -> list[GalleryRow]:
    arrays = run.arrays
    if "neighbors" not in arrays:
        return []
    thumbs = _thumbnails(run, styles)

    def neighbors(prefix: str, row: int) -> list[Thumb]:
        if f"{prefix}neighbors" not in arrays:
            return []
        right = arrays.get(f"{prefix}right")
        return [
            Thumb(
                thumbs[at][0],
                f"{thumbs[at][1]} (cosine {arrays[f'{prefix}similarity'][row, j]:.2f})",
                None if right is None else bool(right[row, j]),
            )
            for j, at in enumerate(arrays[f"{prefix}neighbors"][row])
        ]

    return [
        GalleryRow(Thumb(*thumbs[at]), neighbors("", row), neighbors("before_", row))
        for row, at in enumerate(arrays["queries"][:GALLERY_ROWS])
    ]


def _used_styles(galleries: dict[str, list[GalleryRow]], styles: dict[str, str]) -> dict[str, str]:
    used = {
        thumb.style for rows in galleries.values() for row in rows for thumb in (row.query, *row.neighbors, *row.before)
    }
    return {style: uri for style, uri in styles.items() if style in used}


def _count(value: object) -> str:
    """A figure for readers: the length of a list, a number with thousands separators."""
    if isinstance(value, list | dict):
        value = len(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NONE if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _training_facts(run: RunFiles) -> dict[str, str]:
    """How a training went, in words and figures; empty if nothing was logged."""
    rate, wait = (run.series(key)[1] for key in ("images_per_second", "data_wait_share"))
    facts = {
        "target images": _count(lookup(run.summary, "manifest", "num_target")),
        "replayed images": _count(lookup(run.summary, "manifest", "num_source")),
        "steps": _count(run.summary.get("steps")),
        "images seen": _count(run.summary.get("images")),
        "seconds": _count(run.summary.get("seconds")),
        "images/s (median)": f"{np.median(rate):,.0f}" if len(rate) else NONE,
        "waiting for data %": f"{100 * wait.mean():.1f}" if len(wait) else NONE,
        "bad files": _count(run.summary.get("bad_files")),
    }
    return {} if set(facts.values()) == {NONE} else facts


def _facts(groups: dict[str, list[RunFiles]]) -> dict[str, Table]:
    """How the first run of each arm went: its training, and the seconds of each part of its evaluation."""
    training = {name: facts for name, runs in groups.items() if (facts := _training_facts(runs[0]))}
    evaluation = {
        name: {part: _count(seconds) for part, seconds in timings.items()}
        for name, runs in groups.items()
        if (timings := lookup(runs[0].evaluation, "timings"))
    }
    tables = {}
    for title, arms_facts in (("Training", training), ("Evaluation, seconds", evaluation)):
        keys = list(dict.fromkeys(key for row in arms_facts.values() for key in row))
        keys = [key for key in keys if any(row.get(key, NONE) != NONE for row in arms_facts.values())]
        rows = [[name, *(row.get(key, NONE) for key in keys)] for name, row in arms_facts.items()]
        if rows:
            tables[title] = Table(["run", *keys], rows)
    return tables


def _flat(values: dict[str, object]) -> list[tuple[str, str]]:
    """Nested summary values as (dotted name, text) pairs, with long lists shortened."""
    result = []
    for name, value in flattened(values):
        if isinstance(value, list):
            shown = ", ".join(str(v) for v in value[:20]) + (f" … ({len(value)} in total)" if len(value) > 20 else "")
            result.append((name, shown or "none"))
        else:
            result.append((name, _count(value)))
    return result


def _remarks(groups: dict[str, list[RunFiles]]) -> list[str]:
    """What a reader must know to read the figures fairly."""
    remarks = []
    seeds = {len(runs) for runs in groups.values()}
    if max(seeds) > 1:
        remarks.append(f"± is the sample standard deviation over the runs of a row ({min(seeds)} to {max(seeds)}).")
    elif any((f := figure(runs, "clustering")) and f.std is not None for runs in groups.values()):
        remarks.append(
            "± is the sample standard deviation over the trials of one run, which differ in draws and starts but share the "
            "weights. It does not cover the spread over training seeds."
        )
    steps = {runs[0].summary["steps"] for runs in groups.values() if "steps" in runs[0].summary}
    if len(steps) > 1:
        remarks.append(
            "The runs took different numbers of steps (see Timings), so part of a difference may be due to training length."
        )
    if any(lookup(run.evaluation, "fewshot") for runs in groups.values() for run in runs):
        remarks.append("K-shot figures are mean class accuracies after finetuning on K labeled images per class.")
    if any(lookup(run.evaluation, "class_means") for runs in groups.values() for run in runs):
        remarks.append(
            "K-shot means are mean class accuracies of the nearest class mean of K labeled images per class, without training."
        )
    if sum(1 for runs in groups.values() if any(run.evaluation for run in runs)) > 1:
        remarks.append("Bold marks the highest printed mean of a column; it is not a test of significance.")
    return remarks


def _statements(groups: dict[str, list[RunFiles]]) -> list[str]:
    """What the evaluations state that they cannot know, each with its runs if others could."""
    said: dict[str, list[str]] = {}
    for name, runs in groups.items():
        for statement in dict.fromkeys(s for run in runs for s in lookup(run.evaluation, "statements") or ()):
            said.setdefault(statement, []).append(name)
    evaluated = [name for name, runs in groups.items() if any(lookup(run.evaluation, "label_free") for run in runs)]
    return [
        statement if set(names) >= set(evaluated) else f"{', '.join(names)}: {statement}"
        for statement, names in said.items()
    ]


def _verdicts(groups: dict[str, list[RunFiles]], before_after: Table | None) -> list[tuple[str, list[str]]]:
    """(arm, lines): its accuracies before and after, then the verdict without labels of its first run."""
    measured: dict[str, list[str]] = {}
    for name, metric, before, after, change in before_after.rows if before_after else ():
        if metric in ACCURACIES or "-shot" in metric:
            measured.setdefault(name, []).append(f"{metric.removesuffix(' %')} {before} → {after} % ({change})")
    verdicts = []
    for name, runs in groups.items():
        lines = [f"With labels: {', '.join(measured[name])}."] if name in measured else []
        line = lookup(runs[0].summary, "verdict", "line")
        lines += [line] if isinstance(line, str) else []
        if lines:
            verdicts.append((name, lines))
    return verdicts


def _curves(groups: dict[str, list[RunFiles]]) -> list[tuple[str, str]]:
    """(caption, picture) for pretraining and for finetuning, whose steps and losses cannot be compared."""
    finetuned = {name for name, runs in groups.items() if lookup(runs[0].summary, "init")}
    parts = (("From random weights", set(groups) - finetuned), ("From a checkpoint", finetuned))
    drawn = [(caption, picture) for caption, names in parts if (picture := curves(groups, names))]
    return drawn if len(drawn) > 1 else [("", picture) for _, picture in drawn]


def write_report(
    path: Path | str, runs: Runs, title: str = "Unsupervised finetuning", notes: Sequence[str] = ()
) -> None:
    """Write one self-contained HTML page with the figures, curves, maps, gallery, timings and settings of the runs.

    The page needs neither a network nor other files; every name from disk is escaped. Curves, maps, galleries and
    settings are those of the first run with each name; figures are means over all runs with that name.

    Args:
        path: the file to write.
        runs: (name, folder) pairs or loaded runs; runs with the same name are seeds of one arm.
        title: heading of the page.
        notes: sentences shown above the figures.
    """
    loaded = as_runs(runs)
    groups = arms(loaded)
    accuracies, before_after = accuracy_table(loaded), before_after_table(loaded)
    classes: list[str] = next((c for run in loaded if (c := lookup(run.evaluation, "classes"))), [])
    styles: dict[str, str] = {}
    galleries = {name: rows for name, group in groups.items() if (rows := _gallery(group[0], styles))}
    page = render(
        "report.html",
        title=title,
        date=datetime.date.today().isoformat(),
        version=next((v for run in loaded if (v := lookup(run.summary, "versions", "fastuft"))), None),
        notes=list(notes),
        accuracies=accuracies,
        best=best_cells(loaded, accuracies) if accuracies else set(),
        changes=change_table(loaded),
        before_after=before_after,
        verdicts=_verdicts(groups, before_after),
        looks=looks(groups),
        remarks=_remarks(groups),
        statements=_statements(groups),
        damaged=list(dict.fromkeys(damage for run in loaded for damage in run.damaged)),
        curves=_curves(groups),
        watched=watched(groups),
        maps=maps(groups, classes),
        galleries=galleries,
        styles=_used_styles(galleries, styles),
        facts=_facts(groups),
        runs=[(name, group[0], _flat(group[0].summary)) for name, group in groups.items()],
    )
    write_page(Path(path), page)
