"""Options of the loss and of mixing: ``method.*``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastuft.config.checks import AutoAtLeast1, AutoFraction, NonNegative, Positive, check_values

Mix = Literal["none", "cutmix", "mixup"]


@dataclass(frozen=True)
class MethodConfig:
    """MoCoV2 and the paper's two additions (Li et al. 2021, Eq. 4-6).

    Args:
        temperature: tau.
        queue_size: K, negatives kept.
        queue_dtype: dtype of the queue; auto is fp32 on a CPU, and on a GPU the dtype of its matrix products. fp8 (e4m3, one
            scale per key) takes half the memory of bf16 and multiplies in bf16 or fp16; docs/loss.md has its errors.
        key_momentum: m of the key encoder's moving average.
        queue_prefill: fill the queue with keys of training images before epoch 0 (finetuning), or start from random unit
            rows (pretraining).
        mix: how the mixed query of Eq. 5 is made.
        mix_weight: w in L = L_q + w L_m.
        mix_only: train on L_m alone (about 2/3 of the cost).
        alpha: parameter of lambda ~ Beta(alpha, alpha).
        mix_per: one lambda and box per batch, or per pair.
    """

    temperature: Positive = 0.2
    queue_size: AutoAtLeast1 = 65536
    queue_dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    key_momentum: AutoFraction = 0.999
    queue_prefill: bool = True
    mix: Mix = "cutmix"
    mix_weight: NonNegative = 1.0
    mix_only: bool = False
    alpha: Positive = 1.0
    mix_per: Literal["batch", "pair"] = "batch"

    def __post_init__(self) -> None:
        check_values(self, "method")
        if self.mix_only and self.mix == "none":
            raise ValueError("method.mix_only=True needs a mixed query; set method.mix to cutmix or mixup")
