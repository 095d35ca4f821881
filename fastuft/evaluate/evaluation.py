"""The whole evaluation of one backbone on folders of images, and the files it leaves for the report."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastuft.atomic import write_whole
from fastuft.config import EvalConfig
from fastuft.device import choose_device
from fastuft.evaluate.features import module_device, weights_hash
from fastuft.evaluate.folders import read_folders
from fastuft.evaluate.sections import AFTER, BEFORE, Context, run_sections
from fastuft.model import Backbone


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate_backbone`.

    Args:
        metrics: JSON-able values, accuracies as fractions; written as ``eval.json``.
        arrays: what the report draws (map, gallery, thumbnails); written as ``eval_arrays.npz``.
        draws: files of each few-shot draw, by trial and class; written as ``fewshot_draws.json``.
    """

    metrics: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    draws: dict[str, dict[str, list[str]]] = field(default_factory=dict)


@contextmanager
def _at_work(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """The modules on ``device`` in eval mode; afterwards where and as they were."""
    states = [(module, module_device(module), module.training) for module in modules]
    for module in modules:
        module.to(device).eval()
    try:
        yield
    finally:
        for module, home, training in states:
            module.to(home).train(training)


def evaluate_backbone(backbone: Backbone, config: EvalConfig, before: Backbone | None = None) -> Evaluation:
    """Every metric that the given folders allow, for one backbone.

    With class sub-folders in ``config.train`` and ``config.test``: retrieval, clustering, few-shot. With classes in
    ``config.source``: forgetting. Without labels: alignment, uniformity, drift and neighbors, and statements of what
    cannot be known. A metric that has no value (collapsed features, a diverged finetuning, too few images) is stated
    likewise and leaves the others whole; ``not_known`` names it with the reason.

    Args:
        backbone: has ``num_features``, ``mean`` and ``std``; it is not changed.
        config: folders and settings; ``checkpoint``, ``before`` and ``out`` are recorded, not used.
        before: the backbone to compare with, usually the initialization.

    Raises:
        ValueError: one class only, classes of test images that no training image has, unreadable images, features that
            are not finite.
    """
    folders = read_folders(config)
    for doubt in folders.doubts:
        warnings.warn(doubt, stacklevel=2)
    backbones = {AFTER: backbone} if before is None else {AFTER: backbone, BEFORE: before}
    device = choose_device(config.device)
    context = Context(config, folders, backbones)
    with _at_work(list(backbones.values()), device):
        context.extract()
        part = run_sections(context)
    metrics = {
        "labeled": folders.judged,
        "classes": folders.train.classes,
        "counts": {name: len(images.paths) for name, images in folders.named().items()},
        **part.metrics,
        "statements": [*folders.doubts, *part.statements],
        "not_known": part.not_known,
        "timings": {name: round(seconds, 3) for name, seconds in context.timings.items()},
        "backbone": {
            "num_features": int(context.features(AFTER, "train").shape[1]),
            "parameters": sum(p.numel() for p in backbone.parameters()),
            "hash": weights_hash(backbone),
        },
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "config": dataclasses.asdict(config),
    }
    return Evaluation(metrics, part.arrays, part.draws)


def write_evaluation(folder: Path | str, result: Evaluation) -> None:
    """Write ``eval_arrays.npz`` (no pickle), ``fewshot_draws.json`` after few-shot runs, and ``eval.json``.

    ``eval.json`` comes last and whole, so that an evaluation that has it is finished.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    (root / "eval.json").unlink(missing_ok=True)
    np.savez_compressed(root / "eval_arrays.npz", **result.arrays)  # type: ignore[arg-type]
    if result.draws:
        text = json.dumps(result.draws, indent=1, ensure_ascii=False) + "\n"
        (root / "fewshot_draws.json").write_text(text, encoding="utf-8")
    write_whole(root / "eval.json", (json.dumps(result.metrics, indent=1, allow_nan=False) + "\n").encode())
