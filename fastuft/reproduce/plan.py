"""What a grid must train and evaluate, and what that costs: images and steps, and hours if a rate was measured."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from fastuft.config import ReproduceConfig
from fastuft.report import Key, Table
from fastuft.reproduce import grid
from fastuft.reproduce.datasets import LAYOUTS
from fastuft.reproduce.folders import GridFolders
from fastuft.reproduce.grid import Backbone, Measurement
from fastuft.reproduce.recipes import RECIPES, Scale


@dataclass(frozen=True)
class Plan:
    """The parts of a grid, once each.

    Args:
        cells: published figures.
        measurements: evaluations that cells and Figure 1 need.
        backbones: backbones that must exist, pretrained ones first.
    """

    cells: tuple[Key, ...]
    measurements: tuple[Measurement, ...]
    backbones: tuple[Backbone, ...]

    @property
    def datasets(self) -> list[str]:
        """The sorted names of the data sets to evaluate."""
        return sorted({measurement.dataset for measurement in self.measurements})


def make_plan(config: ReproduceConfig) -> Plan:
    """The parts needed by the chosen tables, plots and data sets.

    Raises:
        ValueError: the choices have no cell in common.
    """
    cells = grid.select_cells(config.tables, config.datasets)
    measurements = grid.measurements(cells, config.figure, config.datasets, config.seeds)
    if not measurements:
        raise ValueError(
            f"tables={config.tables}, figure={config.figure} and datasets={config.datasets} have no cell in common; "
            "name more of them"
        )
    return Plan(tuple(cells), tuple(measurements), tuple(grid.backbones(measurements)))


def check_plan(plan: Plan, config: ReproduceConfig, scale: Scale, folders: GridFolders) -> None:
    """Refuse a plan that cannot work, before anything runs.

    Raises:
        ValueError: data or weights are missing; the message says where to put them and how to get them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "reproduce starts the processes of its trainings itself; start it without torchrun, once per machine with "
            "--processes N, or as tasks of a job array with --task and --tasks"
        )
    for backbone in plan.backbones:
        _check_weights(backbone, scale, folders)
    _check_data(plan.datasets, config, scale)


def _check_weights(backbone: Backbone, scale: Scale, folders: GridFolders) -> None:
    given = folders.given(backbone)
    if given is None:
        if backbone.method == "sup_S" and scale.supervised is None:
            raise ValueError(
                "Tables 3 and 4 need weights.supervised_bit_resnet50 and weights.supervised_bit_resnet101: download "
                "BiT-S-R50x1.npz and BiT-S-R101x1.npz from the Big Transfer release and name them, or omit these tables"
            )
    elif not Path(given).exists():
        raise ValueError(
            f"weights.{backbone.pretraining}_{backbone.network}={given!r} does not exist; name a checkpoint"
        )


def _check_data(names: list[str], config: ReproduceConfig, scale: Scale) -> None:
    if config.data is None:
        if scale.write_data is None:
            raise ValueError(
                f"data is missing; name the folder with {', '.join(f'{LAYOUTS[name].folder}/' for name in names)} "
                f"as published, and {scale.source}/"
            )
        return
    for name in names:
        LAYOUTS[name].locate(Path(config.data))
    source = Path(config.source or Path(config.data) / scale.source)
    if not source.is_dir():
        raise ValueError(
            f"source={str(source)!r} is not a folder; name the folder with the source's class folders or .tar shards"
        )


def training_length(backbone: Backbone, scale: Scale) -> tuple[int, int, int]:
    """(images per epoch, epochs, batch size) of a training."""
    if backbone.method == "sup_S":
        training = scale.supervised
        assert training is not None  # otherwise a checkpoint is required, and nothing is trained
        return scale.source_size, training.epochs, training.batch_size
    recipe = RECIPES[backbone.method](scale)
    images = scale.source_size if recipe.on_source else scale.sizes[backbone.dataset].train
    if recipe.replay:
        images += round(scale.replay_fraction * scale.source_size)
    return images, recipe.training.epochs, recipe.training.batch_size


def evaluation_length(measurement: Measurement, scale: Scale, trials: int) -> tuple[int, int, int]:
    """(training images of the data set, steps, images), the last two for few-shot and FixMatch over all K and trials."""
    few, semi, size = scale.evaluation.fewshot, scale.evaluation.semi, scale.sizes[measurement.dataset]
    steps = images = 0
    for shots in measurement.shots:
        labeled = shots * size.classes
        steps += few.epochs * math.ceil(labeled / few.batch_size)
        images += few.epochs * labeled
    for _ in measurement.semi_shots:
        each = math.ceil(size.train / (semi.ratio * semi.batch_size))
        steps += semi.epochs * each
        images += semi.epochs * (size.train + each * semi.batch_size)
    return size.train, trials * steps, trials * images


def plan_table(plan: Plan, scale: Scale, folders: GridFolders, *, trials: int, rate: float | None) -> Table:
    """Every training and evaluation with its images and steps.

    Args:
        plan: the parts.
        scale: sizes.
        folders: the output folder.
        trials: draws or starts per figure.
        rate: measured training images per second, to show the hours of trainings; None shows no hours.
    """
    headers = ["work", "images", "epochs", "steps", "total images", *(["hours"] if rate else []), "status"]
    rows: list[list[str]] = []
    all_steps = all_images = 0
    all_hours = 0.0

    def add(work: str, images: int, epochs: str, steps: int, total: int, hours: float | None, done: bool) -> None:
        nonlocal all_steps, all_images, all_hours
        all_steps, all_images, all_hours = all_steps + steps, all_images + total, all_hours + (hours or 0.0)
        shown = ["" if hours is None else f"{hours:.1f}"] if rate else []
        rows.append([work, f"{images:,}", epochs, f"{steps:,}", f"{total:,}", *shown, "done" if done else "to do"])

    for backbone in plan.backbones:
        # A given checkpoint is not trained here, nor is one that must be given.
        if folders.given(backbone) or (backbone.method == "sup_S" and scale.supervised is None):
            continue
        images, epochs, batch = training_length(backbone, scale)
        steps = epochs * (images // batch)
        hours = steps * batch / rate / 3600 if rate else None
        done = folders.trained(backbone)
        add(f"train {backbone.name}", images, f"{epochs}", steps, steps * batch, hours, done)
    for measurement in plan.measurements:
        images, steps, total = evaluation_length(measurement, scale, trials)
        work = f"evaluate {measurement.backbone.name} on {measurement.dataset}"
        add(work, images, "", steps, total, None, folders.evaluated(measurement))
    rows.append(
        ["all", "", "", f"{all_steps:,}", f"{all_images:,}", *([f"{all_hours:.1f}"] if rate else []), ""],
    )
    return Table(headers, rows)
