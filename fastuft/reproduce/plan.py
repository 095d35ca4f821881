"""What a grid takes, in images and steps; in hours only at a rate that was measured."""

from __future__ import annotations

import math
from collections.abc import Collection

from fastuft.evaluate import FewShotSettings
from fastuft.evaluate.semi import RATIO
from fastuft.report.tables import Table
from fastuft.reproduce.grid import Backbone, Measurement
from fastuft.reproduce.recipes import RECIPES, Scale


def training_length(backbone: Backbone, scale: Scale) -> tuple[int, int, int]:
    """(images of an epoch, epochs, batch) of a training."""
    if backbone.method == "sup_S":
        training = scale.supervised
        assert training is not None  # otherwise a checkpoint is asked for, and nothing is trained
        return scale.source_size, training.epochs, training.batch_size
    recipe = RECIPES[backbone.method](scale)
    images = scale.source_size if recipe.on_source else scale.sizes[backbone.dataset].train
    if recipe.replay:
        images += round(scale.replay_fraction * scale.source_size)
    return images, recipe.training.epochs, recipe.training.batch_size


def evaluation_length(measurement: Measurement, scale: Scale, trials: int) -> tuple[int, int, int]:
    """(training images of the data set, steps, images) of few-shot finetuning and FixMatch over all K and trials."""
    settings, size = scale.evaluation, scale.sizes[measurement.dataset]
    steps = images = 0
    for shots in measurement.shots:
        labeled = shots * size.classes
        steps += settings.fewshot_epochs * math.ceil(labeled / FewShotSettings.batch_size)
        images += settings.fewshot_epochs * labeled
    for _ in measurement.semi_shots:
        each = math.ceil(size.train / (RATIO * settings.semi_batch))
        steps += settings.semi_epochs * each
        images += settings.semi_epochs * (size.train + each * settings.semi_batch)
    return size.train, trials * steps, trials * images


def plan_table(
    scale: Scale,
    trainings: Collection[tuple[Backbone, bool]],
    measurements: Collection[tuple[Measurement, bool]],
    *,
    trials: int,
    rate: float | None,
) -> Table:
    """Every training and evaluation with its images and steps.

    Args:
        scale: sizes.
        trainings: backbones to train and whether each is done.
        measurements: evaluations and whether each is done.
        trials: draws and starts a figure.
        rate: training images a second, as measured; the trainings' hours are shown then, and none otherwise.
    """
    headers = ["work", "images", "epochs", "steps", "images in all", *(["hours"] if rate else []), "state"]
    rows: list[list[str]] = []
    all_steps = all_images = 0
    all_hours = 0.0

    def add(work: str, images: int, epochs: str, steps: int, total: int, hours: float | None, done: bool) -> None:
        nonlocal all_steps, all_images, all_hours
        all_steps, all_images, all_hours = all_steps + steps, all_images + total, all_hours + (hours or 0.0)
        shown = ["" if hours is None else f"{hours:.1f}"] if rate else []
        rows.append([work, f"{images:,}", epochs, f"{steps:,}", f"{total:,}", *shown, "done" if done else "to do"])

    for backbone, done in trainings:
        images, epochs, batch = training_length(backbone, scale)
        steps = epochs * (images // batch)
        hours = steps * batch / rate / 3600 if rate else None
        add(f"train {backbone.name}", images, f"{epochs}", steps, steps * batch, hours, done)
    for measurement, done in measurements:
        images, steps, total = evaluation_length(measurement, scale, trials)
        add(f"evaluate {measurement.backbone.name} on {measurement.dataset}", images, "", steps, total, None, done)
    rows.append(
        ["all", "", "", f"{all_steps:,}", f"{all_images:,}", *([f"{all_hours:.1f}"] if rate else []), ""],
    )
    return Table(headers, rows)
