"""The figures of all trials, the tables that compare them with the paper's, and Figure 1, from existing evaluations."""

from __future__ import annotations

import json

from fastuft.atomic import write_whole
from fastuft.config import DATASETS, ReproduceConfig
from fastuft.report import load_run, write_comparison, write_report
from fastuft.reproduce import grid
from fastuft.reproduce.datasets import LAYOUTS
from fastuft.reproduce.folders import GridFolders, read_json
from fastuft.reproduce.grid import Measurement
from fastuft.reproduce.plan import Plan
from fastuft.reproduce.recipes import Scale


def write_results(plan: Plan, config: ReproduceConfig, scale: Scale, folders: GridFolders) -> None:
    """Write results.jsonl, the comparison and, if chosen, Figure 1.

    Args:
        plan: the cells.
        config: tables, seeds and plots.
        scale: whether figures are comparable with the paper's.
        folders: the output folder.
    """
    folders.out.mkdir(parents=True, exist_ok=True)
    rows = _rows(plan, config, folders)
    write_whole(folders.results, "".join(json.dumps(row) + "\n" for row in rows).encode())
    notes = [f"Scale: {config.scale}; {config.trials} trials per figure."]
    if scale.write_data is not None:
        notes.append(
            "These are small networks on bundled images: the figures show that the grid runs, and are not comparable with "
            "the paper's, which are printed beside them."
        )
    if rows:
        everything = set(config.datasets) == set(DATASETS)
        write_comparison(folders.out, folders.results, notes=notes, missing=everything)
    if config.figure:
        _write_figure(folders, notes)


def _rows(plan: Plan, config: ReproduceConfig, folders: GridFolders) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for key in plan.cells:
        measured = {}
        dataset = ""
        for seed in range(config.seeds):
            backbone, dataset = grid.cell_backbone(key, seed)
            file = folders.evaluation_file(Measurement(backbone, dataset, seed))
            if file.exists():
                measured[seed] = (read_json(file), str(folders.run(backbone)))
        rows += grid.result_rows(key, measured, LAYOUTS[dataset].metric)
    return rows


def _write_figure(folders: GridFolders, notes: list[str]) -> None:
    runs = []
    for title, method in grid.FIGURE_1.items():
        backbone = grid.figure_backbone(method)
        evaluation = folders.evaluation(Measurement(backbone, grid.FIGURE_1_TARGET, 0))
        if (evaluation / "eval_arrays.npz").exists():
            runs.append(load_run(title, [evaluation, folders.run(backbone)]))
    if runs:
        write_report(folders.figure_1, runs, title="Figure 1: t-SNE of the target's features", notes=notes)
