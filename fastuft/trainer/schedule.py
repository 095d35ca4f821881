"""The learning rate over a run."""

from __future__ import annotations

import math

from fastuft.config import OptimConfig


def base_lr(optim: OptimConfig, batch_size: int) -> float:
    """The configured learning rate; with ``scale_lr`` it is for batch size 256 and scales linearly with the batch size."""
    return optim.lr * batch_size / 256 if optim.scale_lr else optim.lr


def lr_at(step: int, total_steps: int, steps_per_epoch: int, optim: OptimConfig, batch_size: int) -> float:
    """The learning rate of a step: linear warm-up over ``warmup_epochs``, then cosine to zero over all steps, or constant."""
    peak = base_lr(optim, batch_size)
    warmup = optim.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / warmup
    if optim.schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * step / total_steps))
