"""A training run from its configuration to its run folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastuft.config import TrainConfig, is_auto
from fastuft.data import Loading, Manifest, TrainStream
from fastuft.device import DTYPES
from fastuft.model import traits_from
from fastuft.runfolder import Progress, RunFolder, RunLock
from fastuft.trainer import judging, watch
from fastuft.trainer.distributed import Ranks, StopVote, naming_lost_ranks, start_ranks, stop_ranks
from fastuft.trainer.doubts import doubts_about
from fastuft.trainer.hold import hold
from fastuft.trainer.judging import Judge, Judgment
from fastuft.trainer.kernel_check import check_before_training, uses_of
from fastuft.trainer.learner import build_learner
from fastuft.trainer.learner_state import restore
from fastuft.trainer.memory import check_memory
from fastuft.trainer.metrics import StepMetrics
from fastuft.trainer.prefill import prefill
from fastuft.trainer.recipe import choices_text, settle, with_saved
from fastuft.trainer.recorder import Recorder, check_writers
from fastuft.trainer.resolved import plain, resolved_config
from fastuft.trainer.resume import check_same_run, find_checkpoint
from fastuft.trainer.saving import Saver, where
from fastuft.trainer.schedule import lr_at
from fastuft.trainer.signals import StopSignals
from fastuft.trainer.step import train_step
from fastuft.trainer.summary import headline, start_text, summary_of


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The outcome of :func:`train`.

    Args:
        run_dir: the run folder.
        steps: completed steps of the whole run.
        finished: False if a signal or ``max_steps`` ended it early; True if the verdict did (``stop: judged``).
        interrupted: name of the signal that ended it, or None.
        metrics: the last row of training metrics.
        bad_files: files that were skipped.
        judgment: the verdict without labels, on the main rank; None if there is none.
    """

    run_dir: Path
    steps: int
    finished: bool
    interrupted: str | None
    metrics: dict[str, Any]
    bad_files: int
    judgment: Judgment | None = None


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """Functions that a run calls on every rank; an exception that they raise ends the run.

    Args:
        on_step: called after each step. To keep the run fast, it must not wait for the device.
        on_epoch: called after each epoch with the last row of training metrics.
    """

    on_step: Callable[[Progress], None] | None = None
    on_epoch: Callable[[Progress, dict[str, Any]], None] | None = None


def train(config: TrainConfig, callbacks: Callbacks | None = None) -> RunResult:
    """Run or resume the training that ``config`` describes, on the ranks that torchrun started.

    Writes ``config.yaml`` (beside it ``config_given.yaml``, with ``auto`` as it was given), ``manifest.json``,
    ``metrics.jsonl``, ``checkpoints/``, ``backbone.safetensors`` and ``summary.json`` into ``config.out``, which no other run
    may use meanwhile. On SIGTERM, SIGUSR1, SIGINT or SIGHUP, the run saves within a step, writes ``stopped.json`` and ends;
    the signal handlers are restored when it returns.

    Raises:
        ValueError: a configuration, folder, checkpoint or file cannot work; nothing was trained.
        NonFiniteLossError: the loss became NaN or infinite; no checkpoint was written after it.
        CheckpointError: a checkpoint could not be read or written.
        FolderInUseError: another run works in the folder.
        FolderLostError: the folder was removed while the run worked in it.
        LostRankError: another process of the run died, was silent for ``runtime.timeout`` seconds, or has a different
            queue.
    """
    check_writers(config.runtime)
    ranks = start_ranks(config.runtime.device, config.runtime.timeout)
    try:
        with (
            StopSignals() as signals,
            hold(RunFolder(Path(config.out)), ranks) as lock,
            ExitStack() as closing,
        ):
            result = _Run(config, ranks, signals, lock, callbacks or Callbacks(), closing).go()
    except BaseException:
        stop_ranks(ranks, failed=True)
        raise
    stop_ranks(ranks)
    return result


class _Run:
    """The life of one run: assembles its parts, then ``go``; ``closing`` closes them."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        signals: StopSignals,
        lock: RunLock | None,
        callbacks: Callbacks,
        closing: ExitStack,
    ) -> None:
        self.ranks, self.signals, self.callbacks = ranks, signals, callbacks
        self.folder = RunFolder(Path(config.out))
        self.began = time.perf_counter()
        self.progress = Progress()
        if watch.wanted(config.watch):
            watch.folders(config)
        given = plain(config)
        state = find_checkpoint(config.resume, self.folder, ranks)
        config = with_saved(config, state, ranks)
        self.manifest = Manifest.build(
            config.target,
            config.source,
            fraction=None if is_auto(config.data.replay_fraction) else config.data.replay_fraction,
            seed=config.data.replay_seed,
            replay_cache=config.data.replay_cache,
            suffixes=config.data.suffixes,
        )
        config, self.choices = settle(config, self.manifest, ranks)
        self.config = config
        check_memory(config, ranks)
        saved = None if state is None else traits_from((state["init_report"] or {}).get("traits"))
        self.learner, report = build_learner(config, ranks, resumed=saved)
        if state is not None:
            self.init_report = state["init_report"]
        else:
            self.init_report = dataclasses.asdict(report) if report else None
        loading = self._loading()
        self.stream = TrainStream(
            self.manifest,
            config.data,
            config.augment,
            loading=loading,
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        closing.callback(self.stream.close)
        resolved = plain(resolved_config(config, self.learner, loading, self.init_report))
        self.total_steps = config.optim.epochs * self.stream.steps_per_epoch
        self.limit = min(self.total_steps, config.max_steps or self.total_steps)
        start = start_text(self.init_report)
        if state is not None:
            check_same_run(state, resolved, given, self.manifest.content_hash, main=ranks.is_main)
            restore(self.learner, state)
            self.progress = Progress.of(state)
            start = f"resumed at step {self.progress.global_step}"
        self.seconds_before = self.progress.seconds
        if ranks.is_main:
            self.folder.stopped_file.unlink(missing_ok=True)
            self.folder.write_config(resolved, given)
            self.manifest.save(self.folder.manifest_file)
        self.saver = Saver(
            self.folder,
            lock,
            self.learner,
            config.runtime,
            config=resolved,
            given=given,
            content_hash=self.manifest.content_hash,
            init_report=self.init_report,
            backbone_file=self.folder.last_file if config.select == "judged" else self.folder.backbone_file,
        )
        self.recorder = Recorder(
            self.folder,
            config.runtime,
            enabled=ranks.is_main,
            total_steps=self.limit,
            resumed_step=self.progress.global_step,
        )
        closing.callback(self.recorder.close)
        self.recorder.say(headline(config, self.manifest, self.total_steps, start))
        if self.choices:
            self.recorder.say(choices_text(self.choices, self.manifest, ranks))
        if config.recipe == "auto" and state is None and ranks.is_main:
            for line in doubts_about(self.manifest):
                self.recorder.say(line)
        self.last_row: dict[str, Any] = next((r for r in reversed(self.recorder.earlier) if r["kind"] == "train"), {})
        self.vote = StopVote(ranks)
        self.judge: Judge | None = None
        self.judgment: Judgment | None = None
        self.judged_enough = False  # whether the verdict ends the run
        if ranks.is_main:
            self.judge = Judge(
                config, self.folder, self.manifest, self.recorder, device=ranks.device, last_step=self.limit
            )

    def _loading(self) -> Loading:
        backbone = self.learner.moco.query_encoder.backbone
        return Loading.of(
            self.config.data,
            mean=backbone.mean,
            std=backbone.std,
            device=self.ranks.device,
            dtype=DTYPES[self.learner.precision],
        )

    def go(self) -> RunResult:
        """Train to the end, to ``max_steps``, or to a signal."""
        with naming_lost_ranks(self.ranks, lambda: where(self.progress, self.folder)):
            interrupted = self._start() or self._loop()
            self.vote.finish()
            found = self.ranks.gather_objects([(bad.path, bad.reason) for bad in self.stream.bad_files])
        bad_files = {path: reason for own in found for path, reason in own}
        if self.judge is not None:
            self.judgment = self.judge.finish()
            summary = summary_of(
                self.config,
                self.learner,
                self.manifest,
                self._progress_now(),
                total_steps=self.total_steps,
                interrupted=interrupted,
                bad_files=bad_files,
                init_report=self.init_report,
                metrics=self.last_row,
                judgment=self.judgment,
                judged_enough=self.judged_enough,
                choices=self.choices,
            )
            self.folder.write_summary(summary)
            if self.judgment is not None and interrupted is None:
                self.recorder.say(self.judgment.line())
            if interrupted is not None:
                self.folder.write_stopped(interrupted, self.progress)
        self.ranks.wait_for_main()
        steps = self.progress.global_step
        finished = self.judged_enough or steps >= self.total_steps
        return RunResult(self.folder.path, steps, finished, interrupted, self.last_row, len(bad_files), self.judgment)

    def _start(self) -> str | None:
        """Everything before the first step, and an evaluation that was due when the run was stopped."""
        progress, config = self.progress, self.config
        check_before_training(self.ranks, uses_of(self.learner), self.recorder.say)
        missed = self.judge is not None and self.judge.missed(progress.global_step)
        if self.ranks.any(missed) and self._look():
            return None if self.judged_enough else self._signal()
        if self.ranks.any(self.judge is not None and self.judge.enough):
            self.judged_enough = True
            return None
        fill = progress.global_step == 0 and config.method.queue_prefill
        if fill and prefill(self.learner, self.stream, self.manifest, self._stop, self.recorder.say):
            return self._signal()
        at_epoch = progress.step == 0 and (progress.global_step == 0 or watch.due(config.watch, progress.epoch))
        seen = any(row["kind"] == "watch" and row["step"] == progress.global_step for row in self.recorder.earlier)
        if watch.wanted(config.watch) and self.ranks.any(self.ranks.is_main and at_epoch and not seen):
            return self._signal() if self._watch() else None
        return None

    def _loop(self) -> str | None:
        steps = min(self.config.runtime.log_every, self.stream.steps_per_epoch)  # an epoch's end writes a row as well
        metrics = StepMetrics(self.ranks, self.config.data.batch_size, steps)
        while self.progress.global_step < self.limit and not self.judged_enough:
            if self._epoch(metrics):
                return None if self.judged_enough else self._signal()
        return None

    def _epoch(self, metrics: StepMetrics) -> bool:
        """Train to the end of the epoch or to the run's last step; returns whether to stop."""
        learner, stream, callbacks = self.learner, self.stream, self.callbacks
        batches = iter(stream.epoch(self.progress.epoch, self.progress.step))
        while True:
            batch = metrics.next_batch(batches)
            lr = self._set_lr()
            metrics.parts.start()
            head_only = self.progress.global_step < self.config.optim.head_warmup_epochs * stream.steps_per_epoch
            metrics.add(train_step(learner, batch, metrics.parts.mark, head_only=head_only))
            self.progress = progress = self.progress.after_step(len(batch.index) * self.ranks.world_size)
            ended = progress.step == stream.steps_per_epoch
            if callbacks.on_step is not None:
                callbacks.on_step(progress)
            stop = self._stop()
            watched = ended and watch.due(self.config.watch, progress.epoch + 1)
            looked = judging.due(self.config, progress.global_step, self.limit)
            # If the verdict selects weights, it selects from those that are saved.
            save = stop or watched or (looked and self.config.select == "judged") or self._save_due(ended)
            if save or looked or ended or metrics.full:
                self.vote.settle()
                self._record(metrics.row(progress, lr, self.folder.checkpoints))
                if ended:
                    self.progress = progress.after_epoch()
                    if callbacks.on_epoch is not None:
                        callbacks.on_epoch(self.progress, self.last_row)
                if save:
                    self.saver.save(self._progress_now())
                if stop or (watched and self._watch()) or (looked and self._look()):
                    return True
                metrics.restart()
            if ended or progress.global_step == self.limit:
                return False

    def _save_due(self, epoch_ended: bool) -> bool:
        step, every = self.progress.global_step, self.config.runtime.save_every
        return step == self.limit or (step % every == 0 if every else epoch_ended)

    def _set_lr(self) -> float:
        config = self.config
        lr = lr_at(
            self.progress.global_step,
            self.total_steps,
            self.stream.steps_per_epoch,
            config.optim,
            config.data.batch_size,
        )
        for group in self.learner.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def _stop(self) -> bool:
        """Whether the ranks have agreed to stop; all of them call this after each step."""
        return self.vote(self.signals.received is not None)

    def _signal(self) -> str:
        return self.signals.received or "a signal to another process"

    def _progress_now(self) -> Progress:
        return self.progress.at(self.seconds_before + time.perf_counter() - self.began)

    def _record(self, row: dict[str, Any]) -> None:
        self.last_row = row
        self.recorder.write(row)
        self.recorder.progress(row)

    def _look(self) -> bool:
        """Look at the features on the main rank while the others wait; returns whether to stop afterwards."""
        wanted = False
        if self.judge is not None:
            wanted = self.judge.look(self.learner.moco.query_encoder.backbone, self.progress)
        self.ranks.wait_for_main()
        stopped = self.ranks.any(self.signals.received is not None)
        self.judged_enough = self.ranks.any(wanted) and not stopped
        return stopped or self.judged_enough

    def _watch(self) -> bool:
        """Evaluate on the main rank while the others wait; returns whether to stop afterwards."""
        if self.ranks.is_main:
            backbone = self.learner.moco.query_encoder.backbone
            figures = watch.evaluate(backbone, self.config, self.ranks.device)
            step, epoch = self.progress.global_step, self.progress.epoch
            self.recorder.write({"kind": "watch", "step": step, "epoch": epoch, "time": time.time(), **figures})
            shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            self.recorder.say(f"epoch {epoch}: {shown}")
        self.ranks.wait_for_main()
        return self.ranks.any(self.signals.received is not None)
