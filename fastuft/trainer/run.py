"""A training run from its configuration to its run folder."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import fastuft
from fastuft.atomic import write_whole
from fastuft.config import TrainConfig
from fastuft.data import Loading, Manifest, TrainStream
from fastuft.model import BACKBONE_FILE, export_backbone
from fastuft.trainer import watch
from fastuft.trainer.distributed import (
    LostRankError,
    Ranks,
    StopVote,
    gather_rows,
    naming_lost_ranks,
    start_ranks,
    stop_ranks,
)
from fastuft.trainer.learner import DTYPES, build_learner
from fastuft.trainer.recorder import PartTimes, Recorder, check_writers
from fastuft.trainer.resume import check_same_run, find_checkpoint
from fastuft.trainer.schedule import lr_at
from fastuft.trainer.signals import StopSignals
from fastuft.trainer.snapshot import backbone_of, queues_agree, ranks_without_finite_weights, restore, take_snapshot
from fastuft.trainer.state import CheckpointError, checkpoints, save_checkpoint
from fastuft.trainer.step import RECORD, train_step


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step, the rank and the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Outcome of :func:`train`.

    Args:
        run_dir: the run folder.
        steps: steps done over the whole run.
        finished: False when a signal or ``max_steps`` ended it early.
        interrupted: name of the signal that ended it, or None.
        metrics: the last row of training metrics.
        bad_files: files that were skipped.
    """

    run_dir: Path
    steps: int
    finished: bool
    interrupted: str | None
    metrics: dict[str, Any]
    bad_files: int


def train(config: TrainConfig) -> RunResult:
    """Run (or go on with) the training that ``config`` describes, on the ranks that torchrun started.

    Writes ``config.yaml``, ``manifest.json``, ``metrics.jsonl``, ``checkpoints/``, ``backbone.safetensors`` and
    ``summary.json`` into ``config.out``. SIGTERM, SIGUSR1 and SIGINT save within a step and end the run.

    Raises:
        ValueError: a configuration, folder, checkpoint or file that cannot work; nothing was trained.
        NonFiniteLossError: the loss became NaN or infinite; no checkpoint was written after it.
        CheckpointError: a checkpoint could not be read or written.
        LostRankError: another process of the run died, fell silent for ``runtime.timeout`` seconds, or holds another
            queue.
    """
    check_writers(config.runtime)
    ranks = start_ranks(config.runtime.device, config.runtime.timeout)
    try:
        with StopSignals() as signals:
            return _Run(config, ranks, signals).go()
    finally:
        stop_ranks(ranks)


class _Run:
    """State of one run; ``go`` drives it."""

    def __init__(self, config: TrainConfig, ranks: Ranks, signals: StopSignals) -> None:
        self.config, self.ranks, self.signals = config, ranks, signals
        self.folder = Path(config.out)
        self.checkpoint_folder = self.folder / "checkpoints"
        self.began = time.perf_counter()
        self.seconds_before = 0.0
        self.epoch, self.step, self.global_step, self.images = 0, 0, 0, 0
        self.plain_config = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples as lists
        state = find_checkpoint(config.resume, config.out, ranks)
        self.resumed = state is not None
        self.learner, report = build_learner(config, ranks, load=not self.resumed)
        self.init_report = dataclasses.asdict(report) if report else None
        self.manifest = Manifest.build(
            config.target,
            config.source,
            fraction=config.data.replay_fraction,
            seed=config.data.replay_seed,
            replay_cache=config.data.replay_cache,
        )
        backbone = self.learner.moco.query_encoder.backbone
        self.stream = TrainStream(
            self.manifest,
            config.data,
            config.augment,
            loading=Loading.of(
                config.data,
                mean=backbone.mean,
                std=backbone.std,
                device=ranks.device,
                dtype=DTYPES[self.learner.precision],
            ),
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        self.total_steps = config.optim.epochs * self.stream.steps_per_epoch
        self.limit = min(self.total_steps, config.max_steps or self.total_steps)
        if state is not None:
            self._restore(state)
        if ranks.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.recorder = Recorder(
            self.folder,
            config.runtime,
            enabled=ranks.is_main,
            total_steps=self.limit,
            resumed_step=self.global_step,
        )
        self.last_row: dict[str, Any] = next((r for r in reversed(self.recorder.earlier) if r["kind"] == "train"), {})
        self.vote = StopVote(ranks)

    def _restore(self, state: dict[str, Any]) -> None:
        check_same_run(state, self.plain_config, self.manifest.content_hash, main=self.ranks.is_main)
        restore(self.learner, state)
        self.epoch, self.step, self.global_step = state["epoch"], state["step"], state["global_step"]
        self.images, self.seconds_before = state["images"], state["seconds"]
        self.init_report = state["init_report"]

    def _seconds(self) -> float:
        """Time spent on this run, the parts before it was resumed included."""
        return self.seconds_before + time.perf_counter() - self.began

    def go(self) -> RunResult:
        """Train to the end, to ``max_steps``, or to a signal."""
        if self.ranks.is_main:
            self._write_config()
            self.recorder.say(self._headline())
        try:
            with naming_lost_ranks(self.ranks, self._where):
                interrupted = self._start() or self._loop()
                self.vote.finish()
                bad = {path: reason for found in self._bad_files() for path, reason in found}
        finally:
            self.recorder.close()
            self.stream.close()
        finished = self.global_step >= self.total_steps
        if self.ranks.is_main:
            self._write_summary(finished, interrupted, bad)
        self.ranks.wait_for_main()
        return RunResult(self.folder, self.global_step, finished, interrupted, self.last_row, len(bad))

    def _start(self) -> str | None:
        """What comes before the first step, and an evaluation that the run was stopped before."""
        if self.global_step == 0 and self.config.method.queue_prefill and self._prefill():
            return self._signal()
        at_epoch = self.step == 0 and (self.global_step == 0 or watch.due(self.config.watch, self.epoch))
        seen = any(row["kind"] == "watch" and row["step"] == self.global_step for row in self.recorder.earlier)
        if watch.wanted(self.config.watch) and self.ranks.any(self.ranks.is_main and at_epoch and not seen):
            return self._signal() if self._watch() else None
        return None

    def _prefill(self) -> bool:
        """Fill the queue with keys of training images: random rows are no negatives for a trained network.

        Returns whether to stop.
        """
        missing = self.config.method.queue_size
        if missing > len(self.manifest) and self.ranks.is_main:
            warnings.warn(
                f"method.queue_size={missing} exceeds the {len(self.manifest)} training images: the queue holds several "
                "keys of each, among them an image's own older ones; a smaller queue avoids it",
                stacklevel=2,
            )
        for views in self.stream.prefill(missing):
            with torch.no_grad(), self.learner.autocast():
                keys = gather_rows(self.learner.key(views), self.ranks)
            # Batches are encoded whole and cut only here: statistics groups are the same on any number of ranks.
            self.learner.queue.enqueue_(keys[:missing])
            missing -= len(keys)
            if self.vote(self.signals.received is not None):
                return True
        return False

    def _loop(self) -> str | None:
        config, learner, runtime = self.config, self.learner, self.config.runtime
        rows = torch.zeros(runtime.log_every, len(RECORD), device=self.ranks.device)
        parts = PartTimes(self.ranks.device)
        filled, waited, since = 0, 0.0, time.perf_counter()
        while self.global_step < self.limit:
            batches = iter(self.stream.epoch(self.epoch, self.step))
            epoch_done = False
            while not epoch_done and self.global_step < self.limit:
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                lr = self._set_lr()
                parts.start()
                rows[filled].copy_(train_step(learner, batch, parts.mark))
                filled += 1
                self.step += 1
                self.global_step += 1
                self.images += len(batch.index) * self.ranks.world_size
                epoch_done = self.step == self.stream.steps_per_epoch
                stop = self.vote(self.signals.received is not None)
                look = epoch_done and watch.due(config.watch, self.epoch + 1)
                save = stop or look or self.global_step == self.limit or (epoch_done and not runtime.save_every)
                save = save or bool(runtime.save_every and self.global_step % runtime.save_every == 0)
                if save or epoch_done or filled == runtime.log_every:
                    seconds = parts.read()  # waits for the device, whose time the next line counts
                    self._log(rows[:filled], lr, time.perf_counter() - since, waited, seconds)
                    if epoch_done:
                        self.epoch, self.step = self.epoch + 1, 0
                    if save:
                        self._save()
                    if stop or (look and self._watch()):
                        return self._signal()
                    filled, waited, since = 0, 0.0, time.perf_counter()
        return None

    def _set_lr(self) -> float:
        lr = lr_at(
            self.global_step,
            self.total_steps,
            self.stream.steps_per_epoch,
            self.config.optim,
            self.config.data.batch_size,
        )
        for group in self.learner.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _signal(self) -> str:
        return self.signals.received or "a signal to another process"

    def _log(self, rows: Tensor, lr: float, seconds: float, waited: float, parts: dict[str, float]) -> None:
        """Write the mean over the steps since the last row and over ranks; only here the host waits for the device."""
        by_rank = torch.stack(self.ranks.gather_objects(rows.cpu()))  # [ranks, steps, figures]
        self._check_finite(by_rank[:, :, 0])
        steps = len(rows)
        row: dict[str, Any] = {
            "kind": "train",
            "step": self.global_step,
            "epoch": self.epoch,
            "time": time.time(),
            **dict(zip(RECORD, by_rank.double().mean((0, 1)).tolist(), strict=True)),
            "lr": lr,
            "images_per_second": steps * self.config.data.batch_size / seconds,
            "seconds_per_step": seconds / steps,
            "data_wait_share": waited / seconds,
            "seconds": {"data": waited / steps, **{name: value / steps for name, value in parts.items()}},
        }
        self.last_row = row
        self.recorder.write(row)
        self.recorder.progress(row)

    def _check_finite(self, losses: Tensor) -> None:
        """Stop at the first step [ranks, steps] whose loss is not a number."""
        bad = (~losses.T.isfinite()).nonzero().tolist()
        if bad:
            step, rank = self.global_step - losses.shape[1] + bad[0][0] + 1, bad[0][1]
            self._fail(f"the loss is not finite at step {step} on rank {rank}")

    def _fail(self, what: str) -> None:
        raise NonFiniteLossError(
            f"{what}; the last good checkpoint is {self._last_good()}. Lower optim.lr, set optim.clip_grad, or use "
            "runtime.precision=fp32, and go on with resume=auto"
        )

    def _last_good(self) -> str:
        return next((str(path) for _, path in checkpoints(self.checkpoint_folder)), "none")

    def _where(self) -> str:
        return (
            f"at step {self.global_step}; the last good checkpoint is {self._last_good()}. Go on with resume=auto, on any "
            "number of processes"
        )

    def _save(self) -> None:
        """Checkpoint and exported backbone, once the weights are known to be finite and the queues to agree."""
        bad = ranks_without_finite_weights(self.learner)
        if bad:
            self._fail(f"the weights are not finite after step {self.global_step} on rank {bad[0]}")
        if not queues_agree(self.learner):
            raise LostRankError(f"the key queues of the processes differ {self._where()}")
        state = {
            **take_snapshot(self.learner),
            "epoch": self.epoch,
            "step": self.step,
            "global_step": self.global_step,
            "images": self.images,
            "seconds": self._seconds(),
            "init_report": self.init_report,
            "content_hash": self.manifest.content_hash,
            "model_config": self.plain_config["model"],
            "config": json.dumps(self.plain_config),
        }
        failure = None
        if self.ranks.is_main:
            try:
                self._write_checkpoint(state)
            except CheckpointError as error:
                failure = error
        reasons = self.ranks.gather_objects(None if failure is None else str(failure))
        if reasons[0] is not None:
            raise failure or CheckpointError(reasons[0])

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
        runtime = self.config.runtime
        save_checkpoint(
            self.checkpoint_folder,
            self.global_step,
            state,
            keep_last=runtime.keep_last,
            keep_every=runtime.keep_every,
        )
        path = self.folder / BACKBONE_FILE
        try:
            export_backbone(backbone_of(self.learner, state), path)
        except OSError as error:
            raise CheckpointError(
                f"{path} could not be written ({error.strerror}); the last good checkpoint is {self._last_good()}. Free "
                "the disk and go on with resume=auto."
            ) from error

    def _watch(self) -> bool:
        """Evaluate on the main rank while the others wait; whether to stop afterwards."""
        if self.ranks.is_main:
            backbone = self.learner.moco.query_encoder.backbone
            figures = watch.evaluate(backbone, self.config, self.ranks.device)
            row = {"kind": "watch", "step": self.global_step, "epoch": self.epoch, "time": time.time(), **figures}
            self.recorder.write(row)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            self.recorder.say(f"epoch {self.epoch}: {shown}")
        self.ranks.wait_for_main()
        return self.ranks.any(self.signals.received is not None)

    def _headline(self) -> str:
        counts = f"{self.manifest.num_target} target and {self.manifest.num_source} replayed images"
        start = "random initialization"
        if self.init_report is not None:
            matched, ignored = len(self.init_report["matched"]), len(self.init_report["ignored"])
            head = "its head" if self.init_report["head_loaded"] else "a fresh head"
            start = f"{self.init_report['path']} ({matched} tensors matched, {ignored} ignored, {head})"
        if self.resumed:
            start = f"resumed at step {self.global_step}"
        return f"{self.folder}: {counts}, {self.total_steps} steps of {self.config.data.batch_size}; {start}"

    def _write_config(self) -> None:
        write_whole(self.folder / "config.yaml", yaml.safe_dump(self.plain_config, sort_keys=False).encode())
        self.manifest.save(self.folder / "manifest.json")

    def _bad_files(self) -> list[list[tuple[str, str]]]:
        return self.ranks.gather_objects([(entry.path, entry.reason) for entry in self.stream.bad_files])

    def _write_summary(self, finished: bool, interrupted: str | None, bad: dict[str, str]) -> None:
        device = self.ranks.device
        summary = {
            "steps": self.global_step,
            "total_steps": self.total_steps,
            "epochs": self.config.optim.epochs,
            "images": self.images,
            "seconds": self._seconds(),
            "finished": finished,
            "interrupted": interrupted,
            "bad_files": len(bad),
            "bad_file_list": [{"path": path, "reason": reason} for path, reason in sorted(bad.items())[:1000]],
            "manifest": self.manifest.summary(),
            "seeds": {"run": self.config.seed, "replay": self.config.data.replay_seed},
            "bn": self.learner.bn,
            "precision": self.learner.precision,
            "world_size": self.ranks.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "init": self.init_report,
            "metrics": self.last_row,
            "versions": {
                "fastuft": fastuft.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        write_whole(self.folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
