"""A training run from its configuration to its run folder: the life of the run, from its first step to its last."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastuft.config import TrainConfig
from fastuft.model import Backbone
from fastuft.runfolder import Progress, RunFolder
from fastuft.trainer import judging, watch
from fastuft.trainer.distributed import StopVote, naming_lost_ranks, start_ranks, stop_ranks
from fastuft.trainer.hold import hold
from fastuft.trainer.judging import Judgment
from fastuft.trainer.kernel_check import check_before_training, uses_of
from fastuft.trainer.metrics import StepMetrics
from fastuft.trainer.parts import Parts, assemble
from fastuft.trainer.prefill import prefill
from fastuft.trainer.recorder import check_writers
from fastuft.trainer.saving import where
from fastuft.trainer.schedule import lr_at
from fastuft.trainer.signals import StopSignals
from fastuft.trainer.step import train_step
from fastuft.trainer.summary import summary_of


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
            parts = assemble(config, ranks, lock, closing)
            result = _Run(parts, signals, callbacks or Callbacks()).go()
    except BaseException:
        stop_ranks(ranks, failed=True)
        raise
    stop_ranks(ranks)
    return result


class _Run:
    """The life of one run from its parts: ``go``."""

    def __init__(self, parts: Parts, signals: StopSignals, callbacks: Callbacks) -> None:
        self.parts, self.signals, self.callbacks = parts, signals, callbacks
        self.config, self.ranks, self.learner = parts.config, parts.ranks, parts.learner
        self.stream, self.recorder, self.judge = parts.stream, parts.recorder, parts.judge
        self.progress = parts.progress
        self.last_row: dict[str, Any] = next((r for r in reversed(self.recorder.earlier) if r["kind"] == "train"), {})
        self.vote = StopVote(self.ranks)
        self.judgment: Judgment | None = None
        self.judged_enough = False  # whether the verdict ends the run

    def go(self) -> RunResult:
        """Train to the end, to ``max_steps``, or to a signal."""
        with naming_lost_ranks(self.ranks, lambda: where(self.progress, self.parts.folder)):
            interrupted = self._start() or self._loop()
            self.vote.finish()
            found = self.ranks.gather_objects([(bad.path, bad.reason) for bad in self.stream.bad_files])
        bad_files = {path: reason for own in found for path, reason in own}
        if self.judge is not None:
            self.judgment = self.judge.finish()
            summary = summary_of(
                self.config,
                self.learner,
                self.parts.manifest,
                self._progress_now(),
                total_steps=self.parts.total_steps,
                interrupted=interrupted,
                bad_files=bad_files,
                init_report=self.parts.init_report,
                metrics=self.last_row,
                judgment=self.judgment,
                judged_enough=self.judged_enough,
                choices=self.parts.choices,
            )
            self.parts.folder.write_summary(summary)
            if self.judgment is not None and interrupted is None:
                self.recorder.say(self.judgment.line())
            if interrupted is not None:
                self.parts.folder.write_stopped(interrupted, self.progress)
        self.ranks.wait_for_main()
        steps = self.progress.global_step
        finished = self.judged_enough or steps >= self.parts.total_steps
        return RunResult(
            self.parts.folder.path, steps, finished, interrupted, self.last_row, len(bad_files), self.judgment
        )

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
        if fill and prefill(self.learner, self.stream, self.parts.manifest, self._stop, self.recorder.say):
            return self._signal()
        at_epoch = progress.step == 0 and (progress.global_step == 0 or watch.due(config.watch, progress.epoch))
        seen = any(row["kind"] == "watch" and row["step"] == progress.global_step for row in self.recorder.earlier)
        if watch.wanted(config.watch) and self.ranks.any(self.ranks.is_main and at_epoch and not seen):
            return self._signal() if self._watch() else None
        return None

    def _loop(self) -> str | None:
        steps = min(self.config.runtime.log_every, self.stream.steps_per_epoch)  # an epoch's end writes a row as well
        metrics = StepMetrics(self.ranks, self.config.data.batch_size, steps)
        while self.progress.global_step < self.parts.limit and not self.judged_enough:
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
            looked = judging.due(self.config, progress.global_step, self.parts.limit)
            # If the verdict selects weights, it selects from those that are saved.
            save = stop or watched or (looked and self.config.select == "judged") or self._save_due(ended)
            if save or looked or ended or metrics.full:
                self.vote.settle()
                self._record(metrics.row(progress, lr, self.parts.folder.checkpoints))
                if ended:
                    self.progress = progress.after_epoch()
                    if callbacks.on_epoch is not None:
                        callbacks.on_epoch(self.progress, self.last_row)
                if save:
                    self.parts.saver.save(self._progress_now())
                if stop or (watched and self._watch()) or (looked and self._look()):
                    return True
                metrics.restart()
            if ended or progress.global_step == self.parts.limit:
                return False

    def _save_due(self, epoch_ended: bool) -> bool:
        step, every = self.progress.global_step, self.config.runtime.save_every
        return step == self.parts.limit or (step % every == 0 if every else epoch_ended)

    def _set_lr(self) -> float:
        config = self.config
        lr = lr_at(
            self.progress.global_step,
            self.parts.total_steps,
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
        return self.progress.at(self.parts.progress.seconds + time.perf_counter() - self.parts.began)

    def _record(self, row: dict[str, Any]) -> None:
        self.last_row = row
        self.recorder.write(row)
        self.recorder.progress(row)

    def _averaged(self) -> Backbone:
        return self.parts.average.of(self.learner.moco.query_encoder.backbone)

    def _look(self) -> bool:
        """Look at the features on the main rank while the others wait; returns whether to stop afterwards."""
        wanted = False
        if self.judge is not None:
            wanted = self.judge.look(self._averaged(), self.progress)
        self.ranks.wait_for_main()
        stopped = self.ranks.any(self.signals.received is not None)
        self.judged_enough = self.ranks.any(wanted) and not stopped
        return stopped or self.judged_enough

    def _watch(self) -> bool:
        """Evaluate on the main rank while the others wait; returns whether to stop afterwards."""
        if self.ranks.is_main:
            figures = watch.evaluate(self._averaged(), self.config, self.ranks.device)
            step, epoch = self.progress.global_step, self.progress.epoch
            self.recorder.write({"kind": "watch", "step": step, "epoch": epoch, "time": time.time(), **figures})
            shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            self.recorder.say(f"epoch {epoch}: {shown}")
        self.ranks.wait_for_main()
        return self.ranks.any(self.signals.received is not None)
