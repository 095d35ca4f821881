"""What a training step works on: encoders, queue and optimizer, and the draws of mixing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastuft.config import MethodConfig
from fastuft.loss import KeyQueue
from fastuft.mix import cutmix_, mixup_, sample_boxes, sample_lambda
from fastuft.model import (
    MoCo,
)
from fastuft.randomness import keyed_seed
from fastuft.trainer.distributed import KeyShuffle, Ranks, gather_rows, upload

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
