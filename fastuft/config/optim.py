"""Options of the optimizer and its schedule: ``optim.*``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastuft.config.checks import (
    AutoAtLeast1,
    AutoNonNegative,
    AutoPositive,
    Fraction,
    NonNegative,
    Range,
    check_range,
    check_values,
    is_auto,
)
from fastuft.config.presets import Optimizer, Preset

AdamBeta = Annotated[float, Range(0.0, 0.99999)]


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule.

    Args:
        preset: source of the values of options that are not given: a family (resnet, vit, convnext), auto by
            ``model.arch``, or none for the paper's. The command line and ``fastuft.finetune`` fill them in; a configuration
            made in Python keeps its own values (see ``fastuft.config.preset_options``).
        lr: learning rate for the configured batch size; see ``scale_lr``.
        scale_lr: multiply ``lr`` by batch_size / 256 (linear scaling; off by default).
        momentum: momentum of SGD and LARS.
        betas: decay rates of AdamW's two averages.
        weight_decay: weight decay: on the gradient in SGD and LARS, on the weights in AdamW.
        decay_norms: also decay norms, biases, position embeddings and tokens, as MoCo does; LARS never does.
        layer_decay: learning rate of a layer relative to the next layer's; the head has the full rate. 1 gives equal rates.
        epochs: passes over target and replayed images.
        schedule: cosine to zero over all steps, or constant.
        warmup_epochs: linear warm-up from zero.
        head_warmup_epochs: epochs at the start that train only the head.
        clip_grad: largest gradient norm; 0 is off.
        optimizer: sgd, adamw, lars (needs timm), or apex_fused_sgd (needs NVIDIA's apex).
    """

    preset: Preset = "none"
    lr: AutoPositive = 0.015
    scale_lr: bool = False
    momentum: Fraction = 0.9
    betas: tuple[AdamBeta, AdamBeta] = (0.9, 0.999)
    weight_decay: NonNegative = 1e-4
    decay_norms: bool = True
    layer_decay: Annotated[float, Range(0.0, 1.0, low_open=True)] = 1.0
    epochs: AutoAtLeast1 = 200
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: AutoNonNegative = 0.0
    head_warmup_epochs: NonNegative = 0.0
    clip_grad: NonNegative = 0.0
    optimizer: Optimizer = "sgd"

    def __post_init__(self) -> None:
        check_values(self, "optim")
        for name in ("warmup_epochs", "head_warmup_epochs"):
            value = getattr(self, name)
            if not is_auto(value) and not is_auto(self.epochs):
                check_range(f"optim.{name}", value, 0.0, self.epochs, remedy="it is a part of optim.epochs")
