"""How a learner is built from a configuration: batch, BatchNorm mode, device, start weights, queue and optimizer."""

from __future__ import annotations

import inspect
import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastuft.config import TrainConfig
from fastuft.device import autocast, queue_dtype, resolve_precision
from fastuft.loss import KeyQueue
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
from fastuft.trainer.distributed import KeyShuffle, Ranks
from fastuft.trainer.learner import Learner, UsedBatchNorm
from fastuft.trainer.optimizer import build_optimizer
from fastuft.trainer.parameter_groups import parameter_groups

# Renamed in torch 2.13, where the old name warns.
_renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
# Each rank has its own running statistics of BatchNorm.
_OWN_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _renamed else "broadcast_buffers": False}


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
