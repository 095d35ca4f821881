"""One training step, in the paper's notation (Li et al. 2021; equation numbers are the paper's)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastuft.config import MethodConfig
from fastuft.data import Batch
from fastuft.loss import KeyQueue, info_nce_with_terms, mixed_info_nce_with_terms
from fastuft.mix import cutmix_, mixup_, sample_boxes, sample_lambda
from fastuft.model import MoCo
from fastuft.randomness import keyed_seed
from fastuft.trainer.distributed import KeyShuffle, Ranks, gather_rows

# Columns of one row of the step's record, in order.
RECORD = ("loss", "loss_q", "loss_m", "alignment", "distribution")


@dataclass
class Learner:
    """Everything a step works on.

    Args:
        moco: query and key encoder.
        query: the query encoder as it is called: itself, or wrapped for several processes, or compiled.
        key: the key encoder as it is called.
        queue: negatives.
        optimizer: of the query encoder.
        scaler: for float16; disabled otherwise.
        method: the loss.
        ranks: the processes.
        shuffle: exchange of key views; None where BatchNorm leaks nothing or is plain by choice.
        mix_group: images among which mixing pairs stay.
        autocast: precision of the encoders' forward passes.
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
    clip_grad: float = 0.0
    seed: int = 0

    def without_reduction(self) -> AbstractContextManager[Any]:
        """Gradients stay local: they are reduced once a step, in the last backward pass."""
        return self.query.no_sync() if isinstance(self.query, DistributedDataParallel) else nullcontext()

    @torch.no_grad()
    def encode_keys(self, views: Tensor, epoch: int, step: int) -> Tensor:
        """Keys of the global batch [B, D] in the images' order, the same on every rank."""
        if self.shuffle is None:
            with self.autocast():
                return gather_rows(self.key(views), self.ranks)
        permutation = self.shuffle.permutation(epoch, step, len(views) * self.ranks.world_size)
        with self.autocast():
            keys = self.key(self.shuffle.scatter(views, permutation))
        return self.shuffle.restore(gather_rows(keys, self.ranks), permutation)

    def mix_(self, images: Tensor, epoch: int, step: int) -> float | Tensor:
        """Eq. 5 in place, within groups of ``mix_group`` images: image i of a group meets the group's last but i.

        Returns lambda: a number with one draw a batch, otherwise [b].
        """
        size = min(self.mix_group, len(images))  # the last batch of an epoch may be smaller
        groups = images.split(size)
        half, (height, width) = size // 2, images.shape[2:]
        lams = []
        for number, group in enumerate(groups):
            # One draw a batch, or one a pair; in either case the same for any number of processes.
            key: tuple[int | str, ...] = ("mix", epoch, step)
            if self.method.mix_per == "pair":
                key = (*key, self.ranks.rank * len(groups) + number)
            generator = torch.Generator().manual_seed(keyed_seed(self.seed, *key))
            draws = 1 if self.method.mix_per == "batch" else half
            if self.method.mix == "cutmix":
                boxes, lam = sample_boxes(draws, height, width, self.method.alpha, generator)
                cutmix_(group, _to(boxes.expand(half, 4).contiguous(), images.device))
            else:
                lam = sample_lambda(draws, self.method.alpha, generator=generator)
                mixup_(group, _to(lam.expand(half).contiguous(), images.device))
            lams.append(lam)
        if self.method.mix_per == "batch" and size % 2 == 0:
            return lams[0].tolist()[0]
        # Both images of a pair keep the same share; an odd group's middle image keeps itself.
        middle = torch.ones(size % 2)
        rows = [torch.cat([lam.expand(half), middle, lam.expand(half).flip(0)]) for lam in lams]
        return _to(torch.cat(rows), images.device)

    def partners(self, keys: Tensor) -> Tensor:
        """Keys of each image's partner in the mix [b, D]."""
        return keys.unflatten(0, (-1, min(self.mix_group, len(keys)))).flip(1).flatten(0, 1)


def _to(value: Tensor, device: torch.device) -> Tensor:
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value


def train_step(learner: Learner, batch: Batch, mark: Callable[[str], None]) -> Tensor:
    """Loss, gradient, update; nothing here waits for the device.

    Args:
        learner: encoders, queue, optimiser, method.
        batch: this rank's views; ``batch.query`` is mixed in place.
        mark: called with the name of each part when it has been issued.

    Returns:
        [len(RECORD)] float32 on the device: this rank's figures, before the update.
    """
    method, x_q, x_k = learner.method, batch.query, batch.key
    tau, negatives, zero = method.temperature, learner.queue.keys, torch.zeros((), device=x_q.device)
    k_all = learner.encode_keys(x_k, batch.epoch, batch.step)  # [B, D], constants
    k = k_all[learner.ranks.rank * len(x_q) :][: len(x_q)]  # [b, D], of this rank's images
    mark("keys")
    l_q = l_m = zero
    if not method.mix_only:
        with nullcontext() if method.mix == "none" else learner.without_reduction():
            with learner.autocast():
                q = learner.query(x_q)  # [b, D]
            mark("forward")
            l_q, alignment, distribution = info_nce_with_terms(q, k, negatives, tau)  # Eq. 4 = Eq. 2 + Eq. 3
            mark("loss")
            learner.scaler.scale(l_q).backward()
            mark("backward")
    if method.mix != "none":
        lam = learner.mix_(x_q, batch.epoch, batch.step)  # Eq. 5
        mark("mix")
        with learner.autocast():
            q_m = learner.query(x_q)
        mark("forward")
        l_m, *terms = mixed_info_nce_with_terms(q_m, k, learner.partners(k), lam, negatives, tau)  # Eq. 6
        if method.mix_only:
            alignment, distribution = terms
        mark("loss")
        learner.scaler.scale(method.mix_weight * l_m).backward()
        mark("backward")
    if learner.clip_grad:
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(learner.moco.query_encoder.parameters(), learner.clip_grad)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad()
    mark("optimizer")
    learner.moco.momentum_update_(method.key_momentum)
    mark("momentum")
    learner.queue.enqueue_(k_all)  # after the loss: no query has met its own key as a negative
    mark("enqueue")
    loss = l_q + method.mix_weight * l_m
    return torch.stack([loss, l_q, l_m, alignment, distribution]).detach().float()


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """bf16 or fp16 forward passes; fp32 runs as it is."""
    if precision == "fp32":
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16):
        yield
