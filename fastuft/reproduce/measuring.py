"""One evaluation of a grid; what an earlier evaluation measured with the same weights is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastuft.config import EvalConfig, ReproduceConfig
from fastuft.console import say
from fastuft.evaluate import evaluate_backbone, weights_hash, write_evaluation
from fastuft.model import load_backbone
from fastuft.reproduce.datasets import PreparedDataset
from fastuft.reproduce.folders import GridFolders, plain, read_json
from fastuft.reproduce.grid import Measurement
from fastuft.reproduce.recipes import Scale

# Settings for which a larger value also serves, and settings that change no figure.
_GROWS = {"fewshot": "shots", "semi": "shots", "map": "points"}
_FREE = ("source", "cache", "out")


def measure(
    measurement: Measurement,
    dataset: PreparedDataset,
    source: str,
    mark: str,
    config: ReproduceConfig,
    scale: Scale,
    folders: GridFolders,
) -> None:
    """Evaluate one backbone on one data set, unless that is already done for these weights.

    Args:
        measurement: what to measure.
        dataset: class folders of the data set.
        source: the source folder.
        mark: beginning of the printed line.
        config: how to run the grid.
        scale: sizes.
        folders: the output folder.

    Raises:
        ValueError: it cannot be evaluated, or a metric has no value; the others are written nevertheless.
    """
    usual = scale.evaluation
    wanted = dataclasses.replace(
        usual,
        checkpoint=folders.checkpoint(measurement.backbone),
        train=dataset.train,
        test=dataset.test,
        source=(config.forgetting or source) if measurement.source else None,
        out=str(folders.evaluation(measurement)),
        fewshot=dataclasses.replace(usual.fewshot, shots=list(measurement.shots)),
        semi=dataclasses.replace(usual.semi, shots=list(measurement.semi_shots)),
        map=usual.map if measurement.tsne else dataclasses.replace(usual.map, points=0),
        trials=config.trials,
        cache=str(folders.features),
        seed=measurement.seed,
        loader=config.loader,
    )
    backbone = measurement.backbone
    loaded = load_backbone(wanted.checkpoint, scale.archs[backbone.pretraining, backbone.network], scale.stem)
    before = read_json(folders.evaluation_file(measurement))
    if before.get("backbone", {}).get("hash") == weights_hash(loaded):
        wanted = _grown(wanted, before["config"])
        if plain(wanted) == before["config"]:
            _check_known(before)
            return
    say(f"{mark}: evaluation on {measurement.dataset}")
    result = evaluate_backbone(loaded, wanted)
    write_evaluation(wanted.out, result)
    _check_known(result.metrics)


def _check_known(evaluation: dict[str, Any]) -> None:
    if evaluation["not_known"]:
        raise ValueError("; ".join(f"{what} is not known: {why}" for what, why in evaluation["not_known"].items()))


def _grown(wanted: EvalConfig, stored: dict[str, Any]) -> EvalConfig:
    """What is wanted, together with what was measured before if the settings agree."""
    if _fixed(plain(wanted)) != _fixed(stored):
        return wanted
    few, semi = wanted.fewshot, wanted.semi
    return dataclasses.replace(
        wanted,
        fewshot=dataclasses.replace(few, shots=sorted({*few.shots, *stored["fewshot"]["shots"]})),
        semi=dataclasses.replace(semi, shots=sorted({*semi.shots, *stored["semi"]["shots"]})),
        map=dataclasses.replace(wanted.map, points=max(wanted.map.points, stored["map"]["points"])),
        source=wanted.source or stored["source"],
    )


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings in which two evaluations must agree."""
    kept = {name: value for name, value in settings.items() if name not in _FREE}
    grown = {group: {k: v for k, v in settings.get(group, {}).items() if k != name} for group, name in _GROWS.items()}
    return kept | grown
