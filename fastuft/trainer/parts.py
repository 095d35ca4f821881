"""The parts of a run, and their assembly before the first step."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastuft.config import TrainConfig, is_auto
from fastuft.data import Loading, Manifest, TrainStream, listings_agreed
from fastuft.device import DTYPES
from fastuft.model import traits_from
from fastuft.runfolder import Progress, RunFolder, RunLock
from fastuft.trainer import watch
from fastuft.trainer.averaging import StartAverage, average_with_start
from fastuft.trainer.distributed import Ranks
from fastuft.trainer.doubts import doubts_about
from fastuft.trainer.judging import Judge
from fastuft.trainer.learner import Learner
from fastuft.trainer.learner_setup import build_learner
from fastuft.trainer.learner_state import restore
from fastuft.trainer.memory import check_memory
from fastuft.trainer.recipe import Choice, choices_text, settle, with_saved
from fastuft.trainer.recorder import Recorder
from fastuft.trainer.resolved import plain, resolved_config
from fastuft.trainer.resume import check_same_run, find_checkpoint
from fastuft.trainer.saving import Saver
from fastuft.trainer.summary import headline, start_text


@dataclass(frozen=True)
class Parts:
    """The parts of a run, at its start or at its checkpoint.

    Args:
        config: the configuration, with the choices of the recipe.
        choices: what the recipe chose at the first start, with reasons.
        ranks: the processes.
        folder: the run folder.
        manifest: the images.
        learner: encoders, queue and optimizer.
        init_report: the report on the tensors of ``init``; None with random weights.
        stream: batches of ``manifest`` on this rank.
        saver: writes the checkpoints.
        recorder: writes the metrics, on the main rank.
        average: average of the weights, for looks, evaluations and exports.
        judge: takes the looks; None except on the main rank.
        progress: the progress to start from.
        total_steps: steps of all epochs.
        limit: the step at which this part of the run ends.
        began: ``time.perf_counter`` at the start of the assembly.
    """

    config: TrainConfig
    choices: list[Choice]
    ranks: Ranks
    folder: RunFolder
    manifest: Manifest
    learner: Learner
    init_report: dict[str, Any] | None
    stream: TrainStream
    saver: Saver
    recorder: Recorder
    average: StartAverage
    judge: Judge | None
    progress: Progress
    total_steps: int
    limit: int
    began: float


def assemble(config: TrainConfig, ranks: Ranks, lock: RunLock | None, closing: ExitStack) -> Parts:
    """The parts of the run that ``config`` describes; its folder then has the configuration and the manifest.

    Args:
        config: the configuration as it was given.
        ranks: the processes.
        lock: the lock on the run folder; None except on the main rank.
        closing: closes the stream and the recorder.

    Raises:
        ValueError: a configuration, folder, checkpoint or file cannot work.
        CheckpointError: a checkpoint could not be read.
    """
    began = time.perf_counter()
    folder = RunFolder(Path(config.out))
    if watch.wanted(config.watch):
        watch.folders(config)  # before any work: they may be refused
    given = plain(config)
    state = find_checkpoint(config.resume, folder, ranks)
    config, kept = with_saved(config, state, ranks)
    with listings_agreed(ranks.from_main):
        manifest = Manifest.build(
            config.target,
            config.source,
            fraction=None if is_auto(config.data.replay_fraction) else config.data.replay_fraction,
            seed=config.data.replay_seed,
            replay_cache=config.data.replay_cache,
            suffixes=config.data.suffixes,
        )
    config, chosen = settle(config, manifest, ranks)
    choices = [*kept, *chosen]
    check_memory(config, ranks)
    saved = None if state is None else traits_from((state["init_report"] or {}).get("traits"))
    learner, report = build_learner(config, ranks, resumed=saved)
    init_report = asdict(report) if report else None
    if state is not None:
        init_report = state["init_report"]
    loading = _loading(config, learner)
    stream = TrainStream(
        manifest,
        config.data,
        config.augment,
        loading=loading,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    closing.callback(stream.close)
    resolved = plain(resolved_config(config, learner, loading, init_report))
    total_steps = config.optim.epochs * stream.steps_per_epoch
    limit = min(total_steps, config.max_steps or total_steps)
    progress, start = Progress(), start_text(init_report)
    if state is not None:
        check_same_run(state, resolved, given, manifest.content_hash, main=ranks.is_main)
        restore(learner, state)
        progress = Progress.of(state)
        start = f"resumed at step {progress.global_step}"
    if ranks.is_main:
        folder.stopped_file.unlink(missing_ok=True)
        folder.write_config(resolved, given)
        manifest.save(folder.manifest_file)
    backbone = learner.moco.query_encoder.backbone
    average = average_with_start(config, folder, backbone, ranks, resumed=state is not None)
    saver = Saver(
        folder,
        lock,
        learner,
        config.runtime,
        average=average,
        config=resolved,
        given=given,
        choices=choices,
        content_hash=manifest.content_hash,
        init_report=init_report,
        backbone_file=folder.last_file if config.select == "judged" else folder.backbone_file,
    )
    recorder = Recorder(
        folder,
        config.runtime,
        enabled=ranks.is_main,
        total_steps=limit,
        resumed_step=progress.global_step,
    )
    closing.callback(recorder.close)
    recorder.say(headline(config, manifest, total_steps, start))
    if chosen:
        recorder.say(choices_text(chosen, manifest, ranks))
    if config.recipe == "auto" and state is None and ranks.is_main:
        for line in doubts_about(manifest):
            recorder.say(line)
    judge = None
    if ranks.is_main:
        judge = Judge(config, folder, manifest, recorder, device=ranks.device, last_step=limit)
    return Parts(
        config=config,
        choices=choices,
        ranks=ranks,
        folder=folder,
        manifest=manifest,
        learner=learner,
        init_report=init_report,
        stream=stream,
        saver=saver,
        recorder=recorder,
        average=average,
        judge=judge,
        progress=progress,
        total_steps=total_steps,
        limit=limit,
        began=began,
    )


def _loading(config: TrainConfig, learner: Learner) -> Loading:
    backbone = learner.moco.query_encoder.backbone
    return Loading.of(
        config.data,
        mean=backbone.mean,
        std=backbone.std,
        device=learner.ranks.device,
        dtype=DTYPES[learner.precision],
    )
