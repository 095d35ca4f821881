"""One training step, in the paper's notation (Li et al. 2021; equation numbers are the paper's)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fastuft.data import Batch
from fastuft.loss import LossOptions, info_nce_with_terms, mixed_info_nce_with_terms
from fastuft.trainer.learner import Learner

# The figures of a step, in order.
RECORD = ("loss", "loss_q", "loss_m", "loss_alignment", "loss_distribution")


def train_step(learner: Learner, batch: Batch, mark: Callable[[str], None], *, head_only: bool = False) -> Tensor:
    """Loss, gradient, update; nothing here waits for the device.

    Args:
        learner: encoders, queue, optimizer, method.
        batch: this rank's views; ``batch.query`` is mixed in place.
        mark: called with the name of each part after it has been issued.
        head_only: whether the backbone's weights stay unchanged.

    Returns:
        This rank's figures before the update, [len(RECORD)] float32 on the device.
    """
    method, x_q = learner.method, batch.query  # [b, 3, H, W]
    tau, negatives = LossOptions(method.temperature), learner.queue  # of K keys
    k_all = learner.encode_keys(batch.key, batch.epoch, batch.step)  # [B, D], constants
    k = learner.own_rows(k_all, len(x_q))  # [b, D], of this rank's images
    mark("keys")
    l_q = l_m = torch.zeros((), device=x_q.device)
    if not method.mix_only:
        with learner.without_reduction() if method.mix != "none" else nullcontext():
            with learner.autocast():
                q = learner.query(x_q)  # [b, D]
            mark("forward")
            l_q, alignment, distribution = info_nce_with_terms(q, k, negatives, tau)  # Eq. 4 = Eq. 2 + Eq. 3
            mark("loss")
            learner.scaler.scale(l_q).backward()
            mark("backward")
    if method.mix != "none":
        lam = learner.mix_(x_q, batch.epoch, batch.step)  # Eq. 5: x_q is mixed from here on; lam [b]
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
    if head_only:
        for parameter in learner.moco.query_encoder.backbone.parameters():
            parameter.grad = None  # the optimizer skips it: neither momentum nor decay moves it
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
    return torch.stack([l_q + method.mix_weight * l_m, l_q, l_m, alignment, distribution]).detach().float()
