"""What is said of a run before its first step, and what is written of it after its last."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

import fastuft
from fastuft.config import TrainConfig
from fastuft.data import Manifest
from fastuft.runfolder import Progress
from fastuft.trainer.judging import Judgment
from fastuft.trainer.learner import Learner
from fastuft.trainer.recipe import Choice


def headline(config: TrainConfig, manifest: Manifest, total_steps: int, start: str) -> str:
    """Images, steps and start of a run in one line."""
    counts = f"{manifest.num_target} target and {manifest.num_source} replayed images"
    return f"{config.out}: {counts}, {total_steps} steps of {config.data.batch_size}; {start}"


def start_text(init_report: dict[str, Any] | None) -> str:
    """What a run that is not resumed starts from.

    Args:
        init_report: what became of the tensors of ``init``; None without it.
    """
    if init_report is None:
        return "random initialization"
    matched, ignored = len(init_report["matched"]), len(init_report["ignored"])
    head = "its head" if init_report["head_loaded"] else "a fresh head"
    others = f"; also there: {', '.join(init_report['others'])}, --init_key takes it" if init_report["others"] else ""
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
    init_report: dict[str, Any] | None,
    metrics: dict[str, Any],
    judgment: Judgment | None,
    judged_enough: bool,
    choices: list[Choice],
) -> dict[str, Any]:
    """What came of a run, as plain values.

    Args:
        config: the run's configuration.
        learner: what was trained.
        manifest: the training images.
        progress: how far the run has come.
        total_steps: how far it was to come.
        interrupted: name of the signal that ended it, or None.
        bad_files: path -> reason of each file that was skipped.
        init_report: what became of the tensors of ``init``.
        metrics: the last row of training metrics.
        judgment: the verdict without labels; None where none was asked for.
        judged_enough: whether the verdict ended the run early.
        choices: what the recipe chose when this part of the run began.
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
            "fastuft": fastuft.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
