"""One evaluation of a grid; what an earlier one measured of the same weights is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastuft.config import EvalConfig, ReproduceConfig
from fastuft.evaluate import evaluate_backbone, weights_hash, write_evaluation
from fastuft.model import load_backbone
from fastuft.reproduce.datasets import PreparedDataset
from fastuft.reproduce.folders import GridFolders, plain, read_json
from fastuft.reproduce.grid import Measurement
from fastuft.reproduce.recipes import Scale

# An evaluation that measured more than is wanted serves as well.
_GROWING = ("shots", "semi_shots", "tsne_points", "source", "cache", "out")


def measure(
    measurement: Measurement,
    dataset: PreparedDataset,
    source: str,
    mark: str,
    config: ReproduceConfig,
    scale: Scale,
    folders: GridFolders,
) -> None:
    """Evaluate one backbone on one data set, unless that is there already for these weights.

    Args:
        measurement: what is measured.
        dataset: its class folders.
        source: the source set.
        mark: what the printed line begins with.
        config: how the grid is run.
        scale: sizes.
        folders: where the evaluation lies.
    """
    wanted = dataclasses.replace(
        scale.evaluation,
        checkpoint=folders.checkpoint(measurement.backbone),
        train=dataset.train,
        test=dataset.test,
        source=(config.forgetting or source) if measurement.source else None,
        out=str(folders.evaluation(measurement)),
        shots=list(measurement.shots),
        semi_shots=list(measurement.semi_shots),
        trials=config.trials,
        tsne_points=scale.evaluation.tsne_points if measurement.tsne else 0,
        cache=str(folders.features),
        seed=measurement.seed,
        loader=config.loader,
    )
    backbone = measurement.backbone
    loaded = load_backbone(wanted.checkpoint, scale.archs[backbone.pretraining, backbone.network], scale.stem)
    before = read_json(folders.figures(measurement))
    if before.get("backbone", {}).get("hash") == weights_hash(loaded):
        wanted = _grown(wanted, before["config"])
        if plain(wanted) == before["config"]:
            return
    print(f"{mark}: evaluation on {measurement.dataset}", flush=True)
    write_evaluation(wanted.out, evaluate_backbone(loaded, wanted))


def _grown(wanted: EvalConfig, stored: dict[str, Any]) -> EvalConfig:
    """What is wanted together with what was measured before, where the two go together."""
    same = {name: value for name, value in plain(wanted).items() if name not in _GROWING}
    if any(stored.get(name) != value for name, value in same.items()):
        return wanted
    return dataclasses.replace(
        wanted,
        shots=sorted({*wanted.shots, *stored["shots"]}),
        semi_shots=sorted({*wanted.semi_shots, *stored["semi_shots"]}),
        tsne_points=max(wanted.tsne_points, stored["tsne_points"]),
        source=wanted.source or stored["source"],
    )
