"""One training of a grid, in this process or in several on this machine; finished trainings are kept."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch
import yaml

from fastuft.atomic import write_whole
from fastuft.config import ReproduceConfig, TrainConfig
from fastuft.console import say
from fastuft.reproduce.folders import GridFolders, plain, read_json
from fastuft.reproduce.grid import Backbone
from fastuft.reproduce.recipes import Scale, train_config
from fastuft.reproduce.supervised import train_supervised
from fastuft.runfolder import RunFolder
from fastuft.trainer import EXIT_PREEMPTED, train

# Settings of a run that change none of its figures.
_NEUTRAL = ("resume", "runtime", "out", "watch", "max_steps")


def pretrain(backbone: Backbone, source: str, config: ReproduceConfig, scale: Scale, folders: GridFolders) -> None:
    """Train a pretrained backbone on the source, with or without labels, unless it is finished."""
    if backbone.method != "sup_S":
        finetune(backbone, source, source, backbone.name, config, scale, folders)
        return
    if folders.trained(backbone):
        return
    say(f"{backbone.name}: supervised training on the source")
    training = scale.supervised
    assert training is not None  # checked before anything ran
    train_supervised(
        source,
        folders.run(backbone),
        arch=scale.archs[backbone.pretraining, backbone.network],
        stem=scale.stem,
        augment=scale.augment,
        epochs=training.epochs,
        lr=training.lr,
        batch_size=training.batch_size,
        # Tables 3 and 4 may share a network at the tiny scale; their weights still differ.
        seed=len(backbone.network),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def finetune(
    backbone: Backbone,
    target: str,
    source: str,
    mark: str,
    config: ReproduceConfig,
    scale: Scale,
    folders: GridFolders,
) -> None:
    """Train one backbone, or resume its training, unless it is finished.

    Args:
        backbone: the backbone to train.
        target: training images of its data set.
        source: the source folder.
        mark: beginning of the printed line.
        config: how to run the grid.
        scale: sizes.
        folders: the output folder.

    Raises:
        ValueError: the run folder has a run with other settings, or processes ended early.
        SystemExit: the training was asked to stop.
    """
    run = train_config(
        backbone,
        scale,
        target=target,
        source=source,
        init=folders.checkpoint(backbone.pretrained),
        out=str(folders.run(backbone)),
    )
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, loader=config.loader))
    _check_same(run)
    if folders.trained(backbone):
        return
    say(f"{mark}: training")
    if config.processes == 1:
        interrupted = train(run).interrupted
    else:
        interrupted = _train_in_processes(run, config.processes, folders.summary(backbone))
    if interrupted:
        say(f"stopped by {interrupted}; the same command continues", error=True)
        raise SystemExit(EXIT_PREEMPTED)


def _check_same(run: TrainConfig) -> None:
    """Refuse to mix runs with different settings in one output folder."""
    before, now = RunFolder(Path(run.out)).read_given(), plain(run)
    if not before:
        return
    changed = [name for name in now if name not in _NEUTRAL and before.get(name) != now[name]]
    if changed:
        raise ValueError(
            f"{run.out} has a run with another {', '.join(changed)}; choose another out, or remove that folder"
        )


def _train_in_processes(run: TrainConfig, processes: int, summary: Path) -> str | None:
    """Train in several processes on this machine; returns the signal that stopped them, or None."""
    folder = Path(run.out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    write_whole(file, yaml.safe_dump(plain(run), sort_keys=False).encode())
    before = summary.stat().st_mtime_ns if summary.exists() else 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", "fastuft.cli", "pretrain", "--config", str(file)]
    failed = _run_stoppable(command) != 0
    fresh = summary.exists() and summary.stat().st_mtime_ns != before  # an older one is from an earlier stop
    result = read_json(summary) if fresh else {}
    if result.get("interrupted"):
        return str(result["interrupted"])
    if failed or not result.get("finished"):
        raise ValueError(f"training ended early in {processes} processes; the same command continues it")
    return None


def _run_stoppable(command: list[str]) -> int:
    """Run a command; signals that ask this process to stop meanwhile (SIGTERM, SIGUSR1) are passed to it as SIGTERM."""
    process: subprocess.Popen[bytes] | None = None
    asked = False

    def pass_on(*_: object) -> None:
        nonlocal asked
        asked = True
        if process is not None:
            process.terminate()

    main_thread = threading.current_thread() is threading.main_thread()  # other threads cannot set handlers
    names = [name for name in ("SIGTERM", "SIGUSR1") if main_thread and hasattr(signal, name)]
    before = {getattr(signal, name): signal.signal(getattr(signal, name), pass_on) for name in names}
    try:
        process = subprocess.Popen(command)
        if asked:  # after the handlers were set and before the start
            process.terminate()
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
