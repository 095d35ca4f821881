"""Options of the machine and of what a run writes: ``runtime.*``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastuft.config.checks import AtLeast0, AtLeast1, Positive, check_values


@dataclass(frozen=True)
class RuntimeConfig:
    """How the run uses the machine.

    Args:
        device: auto (cuda if present), cuda or cpu.
        precision: auto is bf16 on a GPU and fp32 on a CPU; fp16 uses a GradScaler.
        compile: torch.compile the encoders.
        checkpoint_activations: recompute each block's activations in the backward pass instead of storing them, which takes
            less memory and about a third more time.
        deterministic: bit-exact reruns on a GPU, at some cost; runs on a CPU always are.
        log_every: steps between metric rows.
        save_every: steps between checkpoints; 0 saves once per epoch.
        keep_last: how many of the newest checkpoints to keep.
        keep_every: also keep checkpoints whose step is a multiple of this; 0 keeps no others.
        tensorboard: write TensorBoard events beside metrics.jsonl.
        wandb: log to Weights & Biases if it is installed.
        timeout: seconds after which ranks that wait for a lost rank give up.
    """

    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: bool = False
    checkpoint_activations: bool = False
    deterministic: bool = False
    log_every: AtLeast1 = 10
    save_every: AtLeast0 = 0
    keep_last: AtLeast1 = 2
    keep_every: AtLeast0 = 0
    tensorboard: bool = True
    wandb: bool = False
    timeout: Positive = 600.0

    def __post_init__(self) -> None:
        check_values(self, "runtime")
