"""The headline of a run before its first step, and its summary after the last."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

from fastuft.config import TrainConfig
from fastuft.data import Manifest
from fastuft.runfolder import Progress
from fastuft.trainer.judging import Judgment
from fastuft.trainer.learner import Learner
from fastuft.trainer.recipe import Choice
from fastuft.version import VERSION


def headline(config: TrainConfig, manifest: Manifest, total_steps: int, start: str) -> str:
    """The images, steps and start of a run in one line."""
    counts = f"{manifest.num_target} target and {manifest.num_source} replayed images"
    return f"{config.out}: {counts}, {total_steps} steps of {config.data.batch_size}; {start}"


def start_text(init_report: dict[str, Any] | None) -> str:
    """What a run starts from if it is not resumed.

    Args:
        init_report: the report on the tensors of ``init``, or None.
    """
    if init_report is None:
        return "random initialization"
    matched, ignored = len(init_report["matched"]), len(init_report["ignored"])
    head = "its head" if init_report["head_loaded"] else "a fresh head"
    others = f"; --init_key can choose {', '.join(init_report['others'])}" if init_report["others"] else ""
    return (
        f"{init_report['path']}, {init_report['layout']} ({matched} tensors matched, {ignored} ignored, {head}{others})"
    )


def summary_of(
    config: TrainConfig,
    learner: Learner,
    manifest: Manifest,
    progress: Progress,
    *,
    total_steps: int,
    interrupted: str | None,
    bad_files: dict[str, str],
    init_report: dict[str, object] | None,
    metrics: dict[str, object],
    judgment: Judgment | None,
    judged_enough: bool,
    choices: list[Choice],
) -> dict[str, object]:
    """The outcome of a run, as plain values.

    Args:
        config: the run's configuration.
        learner: the trained learner.
        manifest: the training images.
        progress: the progress of the run.
        total_steps: the steps of the whole run.
        interrupted: name of the signal that ended it, or None.
        bad_files: the reason for each skipped file, by its path.
        init_report: the report on the tensors of ``init``.
        metrics: the last row of training metrics.
        judgment: the verdict without labels, or None.
        judged_enough: whether the verdict ended the run early.
        choices: what the recipe chose at the first start.
    """
    device = learner.ranks.device
    return {
        "steps": progress.global_step,
        "total_steps": total_steps,
        "epochs": config.optim.epochs,
        "images": progress.images,
        "seconds": progress.seconds,
        "finished": judged_enough or progress.global_step >= total_steps,
        "interrupted": interrupted,
        "bad_files": len(bad_files),
        "bad_file_list": [{"path": path, "reason": reason} for path, reason in sorted(bad_files.items())[:1000]],
        "manifest": manifest.summary(),
        "seeds": {"run": config.seed, "replay": config.data.replay_seed},
        "recipe": {"name": config.recipe, "chosen": [asdict(choice) for choice in choices]},
        "bn": learner.bn,
        "precision": learner.precision,
        "world_size": learner.ranks.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "init": init_report,
        "metrics": metrics,
        "verdict": None if judgment is None else judgment.as_dict(),
        "versions": {
            "fastuft": VERSION,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
