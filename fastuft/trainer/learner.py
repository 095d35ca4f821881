"""What a training step works on: encoders, queue and optimizer, and how they are built from a configuration."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastuft.config import MethodConfig, TrainConfig
from fastuft.device import autocast, queue_dtype, resolve_precision
from fastuft.loss import KeyQueue
from fastuft.mix import cutmix_, mixup_, sample_boxes, sample_lambda
from fastuft.model import (
    Encoder,
    InitReport,
    MoCo,
    Traits,
    build_backbone,
    has_batchnorm,
    load_init,
    set_batchnorm_mode,
)
from fastuft.randomness import keyed_seed
from fastuft.trainer.distributed import KeyShuffle, Ranks, gather_rows, upload
from fastuft.trainer.optimizer import build_optimizer
from fastuft.trainer.parameter_groups import parameter_groups

# Renamed in torch 2.13, where the old name warns.
_renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
# Each rank has its own running statistics of BatchNorm.
_OWN_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _renamed else "broadcast_buffers": False}

# The BatchNorm mode in use; none for networks without BatchNorm.
UsedBatchNorm = Literal["none", "plain", "split", "shuffle", "sync", "frozen"]


@dataclass
class Learner:
    """Everything a step works on.

    Args:
        moco: query and key encoder.
        query: the query encoder in callable form: itself, compiled, or wrapped for several processes.
        key: the key encoder in callable form.
        queue: negatives.
        optimizer: optimizer of the query encoder.
        scaler: for float16; disabled otherwise.
        method: the loss.
        ranks: the processes.
        shuffle: exchange of key views; None if BatchNorm reveals nothing, or is plain by choice.
        mix_group: number of consecutive images within which mixing pairs are formed.
        autocast: precision of the encoders' forward passes.
        bn: BatchNorm mode in use.
        precision: fp32, bf16 or fp16.
        clip_grad: largest gradient norm; 0 is off.
        seed: the run's seed.
    """

    moco: MoCo
    query: nn.Module
    key: nn.Module
    queue: KeyQueue
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    method: MethodConfig
    ranks: Ranks
    shuffle: KeyShuffle | None
    mix_group: int
    autocast: Callable[[], AbstractContextManager[Any]]
    bn: UsedBatchNorm
    precision: Literal["bf16", "fp16", "fp32"]
    clip_grad: float = 0.0
    seed: int = 0

    def without_reduction(self) -> AbstractContextManager[Any]:
        """Keep gradients local: they are reduced once per step, in the last backward pass."""
        return self.query.no_sync() if isinstance(self.query, DistributedDataParallel) else nullcontext()

    @torch.no_grad()
    def encode_keys(self, views: Tensor, epoch: int, step: int) -> Tensor:
        """The keys of the global batch [B, D] in the order of the images, the same on every rank."""
        if self.shuffle is None:
            with self.autocast():
                return gather_rows(self.key(views), self.ranks)
        permutation = self.shuffle.permutation(epoch, step, len(views) * self.ranks.world_size)
        with self.autocast():
            keys = self.key(self.shuffle.scatter(views, permutation))
        return self.shuffle.restore(gather_rows(keys, self.ranks), permutation)

    def own_rows(self, rows: Tensor, count: int) -> Tensor:
        """This rank's rows [count, D] of the global batch."""
        return rows[self.ranks.rank * count :][:count]

    def mix_(self, images: Tensor, epoch: int, step: int) -> Tensor:
        """Eq. 5 in place, within groups of ``mix_group`` images: image i of a group pairs with image size - 1 - i.

        The draws are functions of (seed, epoch, step) and, with ``mix_per: pair``, of the group's index in the global batch,
        so they do not depend on the number of processes.

        Returns:
            lambda [b], the share of itself that each image keeps. The middle image of an odd group is unchanged.
        """
        size = min(self.mix_group, len(images))  # the last batch of an epoch may be smaller
        groups, half = len(images) // size, size // 2
        height, width = images.shape[2:]
        keys: list[tuple[int, ...]] = [(epoch, step)]
        if self.method.mix_per == "pair":
            keys = [(epoch, step, self.ranks.rank * groups + number) for number in range(groups)]
        regions, lams = [], []
        for key in keys:
            generator = torch.Generator().manual_seed(keyed_seed(self.seed, "mix", *key))
            draws = half if self.method.mix_per == "pair" else 1
            if self.method.mix == "cutmix":
                region, lam = sample_boxes(draws, height, width, self.method.alpha, generator)
            else:
                region = lam = sample_lambda(draws, self.method.alpha, generator=generator)
            regions.append(region.expand(half, *region.shape[1:]))
            lams.append(lam.expand(half))
        mix_ = cutmix_ if self.method.mix == "cutmix" else mixup_
        region = torch.stack(regions)  # [1 or groups, half, ...]
        region = region.expand(groups, *region.shape[1:]).flatten(0, 1).contiguous()
        mix_(images, upload(region, images.device), size)
        kept = torch.stack(lams)
        kept = torch.cat([kept, torch.ones(len(kept), size % 2), kept.flip(1)], 1)  # equal for both images of a pair
        return upload(kept.expand(groups, size).flatten(), images.device)

    def partners(self, keys: Tensor) -> Tensor:
        """The key [b, D] of each image's partner in mixing."""
        groups: Tensor = keys.unflatten(0, (-1, min(self.mix_group, len(keys))))
        return groups.flip(1).flatten(0, 1)


def resolve_bn(config: TrainConfig, world_size: int, backbone: nn.Module) -> UsedBatchNorm:
    """The BatchNorm mode of a run: ``auto`` is split on one device and shuffle on several; none without BatchNorm.

    Raises:
        ValueError: the local batch does not divide into groups, or the mode needs several devices and there is one.
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
    if mode == "frozen" and config.init is None:
        raise ValueError(
            "model.bn='frozen' keeps the statistics of a pretrained network, but there is none; set init, or use auto"
        )
    if mode == "shuffle" and world_size == 1:
        raise ValueError(
            "model.bn='shuffle' exchanges images between processes, but there is only one; use auto or split"
        )
    return mode


def local_batch(config: TrainConfig, world_size: int) -> int:
    """Images per process per step.

    Raises:
        ValueError: the global batch does not divide, or a process has too few images to mix.
    """
    batch = config.data.batch_size
    if batch % world_size:
        raise ValueError(
            f"data.batch_size={batch} is the batch over all processes, and it does not divide over {world_size}; "
            f"choose a multiple of {world_size}"
        )
    if config.method.mix != "none" and batch // world_size < 2:
        raise ValueError(
            f"data.batch_size={batch} leaves one image for each of {world_size} processes, so it has no partner to mix "
            f"with; choose at least {2 * world_size}, or method.mix=none"
        )
    return batch // world_size


def set_up_device(config: TrainConfig, device: torch.device) -> None:
    """Choose between the fastest and the reproducible kernels of a GPU; those of a CPU are reproducible."""
    if device.type != "cuda":
        return
    if config.runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, torch refuses cuBLAS
    torch.use_deterministic_algorithms(config.runtime.deterministic)
    torch.backends.cudnn.deterministic = config.runtime.deterministic
    torch.backends.cudnn.benchmark = not config.runtime.deterministic


def _prepare(encoder: Encoder, config: TrainConfig) -> None:
    """Freeze the patch projection and enable recomputed activations in the query encoder, as configured.

    Raises:
        ValueError: the network has no patch projection, or cannot recompute activations.
    """
    if config.model.freeze_patch:
        frozen = encoder.backbone.patch_projection()
        if not frozen:
            raise ValueError(
                f"model.freeze_patch=True: {config.model.arch} projects no patches to tokens; set it to false"
            )
        for parameter in frozen:
            parameter.requires_grad_(False)
    if config.runtime.checkpoint_activations:
        encoder.backbone.checkpoint_activations()


def build_learner(
    config: TrainConfig, ranks: Ranks, *, resumed: Traits | None = None
) -> tuple[Learner, InitReport | None]:
    """The learner of a run at its start, with the same weights on every rank.

    Args:
        config: the run.
        ranks: the processes.
        resumed: traits of the network of a resumed run, which has its own weights; None uses ``config.init``.

    Returns:
        (learner, the report on the tensors of ``config.init``, or None).

    Raises:
        ValueError: the batch, BatchNorm mode, optimizer or checkpoint cannot work.
    """
    local, device = local_batch(config, ranks.world_size), ranks.device
    set_up_device(config, device)
    precision = resolve_precision(config.runtime.precision, device)
    torch.manual_seed(keyed_seed(config.seed, "init"))
    backbone = build_backbone(config.model.arch, config.model.stem, drop_path=config.model.drop_path)
    backbone.check_size(config.augment.size, "augment.size")
    bn = resolve_bn(config, ranks.world_size, backbone)
    moco = MoCo(backbone, config.model.head_dim)
    report = None
    if resumed is not None:
        moco.adopt(resumed)
    elif config.init is not None:
        report = load_init(
            moco,
            config.init,
            allow_missing=config.allow_missing,
            key=config.init_key,
            channels=config.init_channels,
        )
    if config.model.pool != "own":
        moco.adopt(replace(moco.query_encoder.backbone.traits, pool=config.model.pool))
    moco.copy_query_to_key()
    _prepare(moco.query_encoder, config)
    for encoder in (moco.query_encoder, moco.key_encoder):
        encoder.frozen_statistics = bn == "frozen"
    if bn not in ("none", "frozen"):
        moco = set_batchnorm_mode(moco, bn, config.model.bn_group)
    moco.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    queue = KeyQueue(
        config.method.queue_size,
        config.model.head_dim,
        generator=torch.Generator().manual_seed(keyed_seed(config.seed, "queue")),
        dtype=queue_dtype(config.method.queue_dtype, precision, device),
        gather_distributed=False,  # keys come from all ranks already, in the order that their shuffle restores
    ).to(device)
    # From here on, draws (such as the dropout of a timm backbone) may differ between ranks.
    torch.manual_seed(keyed_seed(config.seed, "rank", ranks.rank))
    query: nn.Module = moco.query_encoder
    key: nn.Module = moco.key_encoder
    if config.runtime.compile:
        query, key = torch.compile(query), torch.compile(key)  # type: ignore[assignment]
    if ranks.world_size > 1:
        query = DistributedDataParallel(
            query,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_OWN_BUFFERS,
        )
    learner = Learner(
        moco=moco,
        query=query,
        key=key,
        queue=queue,
        optimizer=build_optimizer(config.optim, parameter_groups(moco.query_encoder, config.optim), device),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        method=config.method,
        ranks=ranks,
        shuffle=KeyShuffle(ranks, config.seed) if bn in ("split", "shuffle") else None,
        mix_group=config.model.bn_group if bn == "split" else local,
        autocast=partial(autocast, device, precision),
        bn=bn,
        precision=precision,
        clip_grad=config.optim.clip_grad,
        seed=config.seed,
    )
    moco.train()
    return learner, report
