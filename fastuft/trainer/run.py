"""A training run from its configuration to its run folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastuft
from fastuft.config import TrainConfig
from fastuft.data import Batch, Manifest, TrainStream
from fastuft.loss import KeyQueue
from fastuft.model import (
    BACKBONE_FILE,
    InitReport,
    MoCo,
    build_backbone,
    export_backbone,
    has_batchnorm,
    load_init,
    set_batchnorm_mode,
)
from fastuft.randomness import keyed_seed
from fastuft.trainer import watch
from fastuft.trainer.distributed import KeyShuffle, Ranks, gather_rows, start_ranks, stop_ranks
from fastuft.trainer.recorder import PartTimes, Recorder
from fastuft.trainer.schedule import lr_at
from fastuft.trainer.signals import StopSignals
from fastuft.trainer.state import CheckpointError, load_checkpoint, newest_checkpoint, save_checkpoint
from fastuft.trainer.step import RECORD, Learner, autocast, train_step

# What must be the same for a checkpoint's state to mean the same in the resumed run.
_FIXED = ("arch", "stem", "head_dim", "queue_size", "batch_size", "seed", "content_hash")


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
    """
    ranks = start_ranks(config.runtime.device)
    try:
        with StopSignals() as signals:
            return _Run(config, ranks, signals).go()
    finally:
        stop_ranks(ranks)


def resolve_bn(config: TrainConfig, world_size: int, backbone: nn.Module) -> str:
    """BatchNorm mode of a run: ``auto`` is split on one device and shuffle on several; none without BatchNorm.

    Raises:
        ValueError: a local batch that does not divide into groups, or sync without several CUDA devices.
    """
    if not has_batchnorm(backbone):
        return "none"
    mode = config.model.bn
    if mode == "auto":
        mode = "split" if world_size == 1 else "shuffle"
    local = config.data.batch_size // world_size
    if mode == "split" and (local % config.model.bn_group or not config.data.drop_last):
        raise ValueError(
            f"model.bn_group={config.model.bn_group} does not divide the batch of one device, {local} images "
            f"(data.drop_last={config.data.drop_last}); choose a divisor with drop_last, or model.bn=plain"
        )
    if mode == "sync" and (world_size == 1 or not torch.cuda.is_available()):
        raise ValueError("model.bn='sync' needs several CUDA devices; use split on one device, shuffle elsewhere")
    return mode


class _Run:
    """State of one run; ``go`` drives it."""

    def __init__(self, config: TrainConfig, ranks: Ranks, signals: StopSignals) -> None:
        self.config, self.ranks, self.signals = config, ranks, signals
        self.folder = Path(config.out)
        self.started = time.time()
        self.epoch, self.step, self.global_step = 0, 0, 0
        self.last_row: dict[str, Any] = {}
        self.init_report: InitReport | None = None
        self._prepare_device()
        self._open_folder()
        torch.manual_seed(keyed_seed(config.seed, "init"))
        backbone: Any = build_backbone(config.model.arch, config.model.stem)
        self.mean, self.std = backbone.mean, backbone.std
        self.bn = resolve_bn(config, ranks.world_size, backbone)
        self.manifest = Manifest.build(
            config.target,
            config.source,
            fraction=config.data.replay_fraction,
            seed=config.data.replay_seed,
            replay_cache=config.data.replay_cache,
        )
        self.stream = TrainStream(
            self.manifest,
            config.data,
            config.augment,
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
            dtype={"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.precision],
            mean=self.mean,
            std=self.std,
        )
        self.total_steps = config.optim.epochs * self.stream.steps_per_epoch
        self.moco = MoCo(backbone, config.model.head_dim)
        if config.init is not None and self.resumed is None:
            self.init_report = load_init(self.moco, config.init, allow_missing=config.allow_missing)
        elif self.resumed is None:
            self.moco.copy_query_to_key()
        if self.bn != "none":
            self.moco = set_batchnorm_mode(self.moco, self.bn, config.model.bn_group)  # type: ignore[assignment]
        self.moco.to(device=ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        generator = torch.Generator().manual_seed(keyed_seed(config.seed, "queue"))
        self.queue = KeyQueue(config.method.queue_size, config.model.head_dim, generator=generator).to(ranks.device)
        self.learner = self._learner()
        if self.resumed is not None:
            self._restore(self.resumed)
        self.recorder = Recorder(
            self.folder,
            config.runtime,
            enabled=ranks.is_main,
            total_steps=min(self.total_steps, config.max_steps or self.total_steps),
            resumed_step=self.global_step,
        )

    def _prepare_device(self) -> None:
        runtime, device = self.config.runtime, self.ranks.device
        self.precision = runtime.precision
        if self.precision == "auto":
            self.precision = "bf16" if device.type == "cuda" else "fp32"
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = not runtime.deterministic
            torch.use_deterministic_algorithms(runtime.deterministic)

    def _open_folder(self) -> None:
        """Decide what to resume, or claim a folder that holds no run yet."""
        self.resumed: dict[str, Any] | None = None
        checkpoint_folder = self.folder / "checkpoints"
        resume = self.config.resume
        if resume == "auto":
            self.resumed, path, reasons = newest_checkpoint(checkpoint_folder)
            for reason in reasons if self.ranks.is_main else []:
                warnings.warn(f"{reason}; the one before it is used", stacklevel=2)
            if reasons and path is None:
                raise CheckpointError(f"resume='auto': no checkpoint in {checkpoint_folder} is whole: {reasons[0]}")
        elif resume != "no":
            self.resumed = load_checkpoint(Path(resume))
        elif (self.folder / "metrics.jsonl").exists() or checkpoint_folder.exists():
            raise ValueError(
                f"out={self.config.out!r} holds a run already; go on with resume=auto, or choose another folder"
            )
        self.ranks.barrier()
        if self.ranks.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)

    def _learner(self) -> Learner:
        config, ranks = self.config, self.ranks
        query: nn.Module = self.moco.query_encoder
        key: nn.Module = self.moco.key_encoder
        if config.runtime.compile:
            query, key = torch.compile(query), torch.compile(key)  # type: ignore[assignment]
        if ranks.world_size > 1:
            query = DistributedDataParallel(
                query,
                device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        local = config.data.batch_size // ranks.world_size
        return Learner(
            moco=self.moco,
            query=query,
            key=key,
            queue=self.queue,
            optimizer=self._optimizer(),
            scaler=torch.amp.GradScaler(ranks.device.type, enabled=self.precision == "fp16"),
            method=config.method,
            ranks=ranks,
            shuffle=KeyShuffle(ranks, config.seed) if self.bn in ("split", "shuffle") else None,
            mix_group=config.model.bn_group if self.bn == "split" else local,
            autocast=partial(autocast, ranks.device, self.precision),
            clip_grad=config.optim.clip_grad,
            seed=config.seed,
        )

    def _optimizer(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        options: dict[str, Any] = {"momentum": optim.momentum, "weight_decay": optim.weight_decay, "lr": optim.lr}
        parameters = list(self.moco.query_encoder.parameters())
        if optim.optimizer == "sgd":
            return torch.optim.SGD(parameters, fused=True, **options)
        try:
            from apex.optimizers import FusedSGD
        except ImportError as error:
            raise ValueError(
                "optim.optimizer='apex_fused_sgd' needs NVIDIA's apex, built from its own repository; the package named "
                "apex on PyPI is an unrelated web toolkit. Use optim.optimizer=sgd, which is fused as well"
            ) from error
        return FusedSGD(parameters, **options)

    def _fixed(self) -> dict[str, Any]:
        config = self.config
        return {
            "arch": config.model.arch,
            "stem": config.model.stem,
            "head_dim": config.model.head_dim,
            "queue_size": config.method.queue_size,
            "batch_size": config.data.batch_size,
            "seed": config.seed,
            "content_hash": self.manifest.content_hash,
        }

    def _state(self) -> dict[str, Any]:
        """Everything a resumed run needs. BatchNorm's buffers differ between ranks, so every rank's are kept."""
        buffers = {name: value.cpu() for name, value in self.moco.named_buffers()}
        return {
            "model": self.moco.state_dict(),
            "rank_buffers": self.ranks.gather_objects(buffers),
            "queue": self.queue.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "scaler": self.learner.scaler.state_dict(),
            "torch_rng": self.ranks.gather_objects(torch.get_rng_state()),
            "epoch": self.epoch,
            "step": self.step,
            "global_step": self.global_step,
            "fixed": self._fixed(),
            "model_config": dataclasses.asdict(self.config.model),
            "config": json.dumps(dataclasses.asdict(self.config)),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        ours = self._fixed()
        for name in _FIXED:
            if state["fixed"][name] != ours[name]:
                raise ValueError(
                    f"resume={self.config.resume!r}: {name} was {state['fixed'][name]!r} in the checkpoint and is "
                    f"{ours[name]!r} now; resume with the same images and settings, or start in another folder"
                )
        self.moco.load_state_dict(state["model"])
        if len(state["rank_buffers"]) == self.ranks.world_size:
            own = state["rank_buffers"][self.ranks.rank]
            with torch.no_grad():
                for name, buffer in self.moco.named_buffers():
                    buffer.copy_(own[name])
            torch.set_rng_state(state["torch_rng"][self.ranks.rank])
        self.queue.load_state_dict(state["queue"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.learner.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.global_step = state["epoch"], state["step"], state["global_step"]

    def _prefill(self) -> None:
        """Fill the queue with keys of training images: random rows are no negatives for a trained network."""
        size = self.config.method.queue_size
        if size > len(self.manifest) and self.ranks.is_main:
            warnings.warn(
                f"method.queue_size={size} exceeds the {len(self.manifest)} training images: the queue holds several "
                "keys of each, among them an image's own older ones; a smaller queue avoids it",
                stacklevel=2,
            )
        self.moco.key_encoder.train()
        with torch.no_grad():
            for views in self.stream.prefill(size):
                with self.learner.autocast():
                    keys = self.learner.key(views)
                self.queue.enqueue_(gather_rows(keys, self.ranks))

    def go(self) -> RunResult:
        """Train to the end, to ``max_steps``, or to a signal."""
        if self.ranks.is_main:
            self._write_config()
            self.recorder.say(self._headline())
        self.moco.train()
        interrupted = None
        try:
            if self.global_step == 0 and self.config.method.queue_prefill:
                self._prefill()
            if self.global_step == 0 and watch.wanted(self.config.watch):
                self._watch()
            interrupted = self._loop()
        finally:
            self.recorder.close()
            self.stream.close()
        finished = self.global_step >= self.total_steps
        if self.ranks.is_main:
            self._write_summary(finished, interrupted)
        self.ranks.barrier()
        return RunResult(
            self.folder, self.global_step, finished, interrupted, self.last_row, len(self.stream.bad_files)
        )

    def _loop(self) -> str | None:
        config, learner, runtime = self.config, self.learner, self.config.runtime
        limit = min(self.total_steps, config.max_steps or self.total_steps)
        rows = torch.zeros(runtime.log_every, len(RECORD), device=self.ranks.device)
        parts = PartTimes(self.ranks.device)
        filled, waited, since, saved = 0, 0.0, time.perf_counter(), self.global_step
        while self.global_step < limit:
            batches: Iterator[Batch] = self.stream.epoch(self.epoch, self.step)
            while self.global_step < limit:
                before = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    break
                waited += time.perf_counter() - before
                lr = lr_at(
                    self.global_step,
                    self.total_steps,
                    self.stream.steps_per_epoch,
                    config.optim,
                    config.data.batch_size,
                )
                for group in learner.optimizer.param_groups:
                    group["lr"] = lr
                parts.start()
                rows[filled].copy_(train_step(learner, batch, parts.mark))
                filled += 1
                self.step += 1
                self.global_step += 1
                epoch_done = self.step == self.stream.steps_per_epoch
                last = self.global_step == limit
                stop = self.ranks.any(self.signals.received is not None)
                due = bool(runtime.save_every) and self.global_step % runtime.save_every == 0
                due = due or stop or last or (not runtime.save_every and epoch_done)
                if filled == runtime.log_every or due or epoch_done:
                    self._log(rows[:filled], lr, time.perf_counter() - since, waited, parts.read())
                    filled, waited, since = 0, 0.0, time.perf_counter()
                if epoch_done:
                    self.epoch, self.step = self.epoch + 1, 0
                if due:
                    self._save()
                    saved = self.global_step
                if stop:
                    return self.signals.received or "signal on another rank"
                if epoch_done and watch.due(config.watch, self.epoch):
                    self._watch()
                    since = time.perf_counter()
                if epoch_done:
                    break
        if saved != self.global_step:
            self._save()
        return None

    def _log(self, rows: torch.Tensor, lr: float, seconds: float, waited: float, parts: dict[str, float]) -> None:
        """Write the mean of the steps since the last row; here, and only here, the host waits for the device."""
        values = rows.cpu()
        self._check_finite(values)
        steps = len(values)
        row: dict[str, Any] = {
            "kind": "train",
            "step": self.global_step,
            "epoch": self.epoch,
            "time": time.time(),
            **dict(zip(RECORD, values.mean(0).tolist(), strict=True)),
            "lr": lr,
            "images_per_second": steps * self.config.data.batch_size / seconds,
            "seconds_per_step": seconds / steps,
            "data_wait_share": waited / seconds,
            "seconds": {"data": waited / steps, **{name: value / steps for name, value in parts.items()}},
        }
        self.last_row = row
        self.recorder.write(row)
        self.recorder.progress(row)

    def _check_finite(self, values: torch.Tensor) -> None:
        bad = (~values[:, 0].isfinite()).nonzero().flatten().tolist()
        first = self.global_step - len(values) + bad[0] + 1 if bad else None
        found = [(step, rank) for rank, step in enumerate(self.ranks.gather_objects(first)) if step is not None]
        if found:
            step, rank = min(found)
            _, path, _ = newest_checkpoint(self.folder / "checkpoints")
            raise NonFiniteLossError(
                f"the loss is not finite at step {step} on rank {rank}; the last good checkpoint is {path or 'none'}. "
                "Lower optim.lr, set optim.clip_grad, or use runtime.precision=fp32, and go on with resume=auto"
            )

    def _save(self) -> None:
        digest = hashlib.sha256(self.queue.keys.cpu().numpy().tobytes()).hexdigest()
        if len(set(self.ranks.gather_objects(digest))) > 1:
            raise RuntimeError(
                f"the key queues of the ranks differ at step {self.global_step}; no checkpoint was written"
            )
        state = self._state()
        if self.ranks.is_main:
            runtime = self.config.runtime
            save_checkpoint(
                self.folder / "checkpoints",
                self.global_step,
                state,
                keep_last=runtime.keep_last,
                keep_every=runtime.keep_every,
            )
            model = self.config.model
            export_backbone(
                self.moco.query_encoder.backbone, self.folder / BACKBONE_FILE, arch=model.arch, stem=model.stem
            )
        self.ranks.barrier()

    def _watch(self) -> None:
        if self.ranks.is_main:
            backbone = self.moco.query_encoder.backbone
            figures = watch.evaluate(backbone, self.config, self.ranks.device)
            row = {"kind": "watch", "step": self.global_step, "epoch": self.epoch, "time": time.time(), **figures}
            self.recorder.write(row)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            self.recorder.say(f"epoch {self.epoch}: {shown}")
        self.ranks.barrier()

    def _headline(self) -> str:
        counts = f"{self.manifest.num_target} target and {self.manifest.num_source} replayed images"
        start = (
            f"resumed at step {self.global_step}" if self.resumed else str(self.init_report or "random initialisation")
        )
        return f"{self.folder}: {counts}, {self.total_steps} steps of {self.config.data.batch_size}; {start}"

    def _write_config(self) -> None:
        content = json.loads(json.dumps(dataclasses.asdict(self.config)))  # tuples as lists
        (self.folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        self.manifest.save(self.folder / "manifest.json")

    def _write_summary(self, finished: bool, interrupted: str | None) -> None:
        bad = self.stream.bad_files
        before = self._earlier_seconds()
        report = self.init_report
        summary = {
            "steps": self.global_step,
            "total_steps": self.total_steps,
            "epochs": self.config.optim.epochs,
            "images": self.global_step * self.config.data.batch_size,
            "seconds": before + time.time() - self.started,
            "finished": finished,
            "interrupted": interrupted,
            "bad_files": len(bad),
            "bad_file_list": [dataclasses.asdict(entry) for entry in bad[:1000]],
            "manifest": self.manifest.summary(),
            "seed": self.config.seed,
            "bn": self.bn,
            "precision": self.precision,
            "world_size": self.ranks.world_size,
            "device": torch.cuda.get_device_name()
            if self.ranks.device.type == "cuda"
            else platform.processor() or "cpu",
            "init": str(report) if report else None,
            "metrics": self.last_row,
            "versions": {
                "fastuft": fastuft.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        path = self.folder / "summary.json"
        partial_path = path.with_suffix(".partial")
        partial_path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        partial_path.replace(path)

    def _earlier_seconds(self) -> float:
        """Time spent by the parts of this run before it was resumed."""
        path = self.folder / "summary.json"
        if self.resumed is None or not path.exists():
            return 0.0
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
