"""The optimizer of a run: torch's fused SGD, or apex's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from fastuft.config import OptimConfig


class ChannelsLastSGD(torch.optim.SGD):
    """torch's fused SGD for a CPU, without the copies that its kernel makes of what is not contiguous.

    Weights in channels_last are such; with two axes moved they are contiguous, and the update is elementwise. Takes half the
    time over a ResNet-18. State and its layout are torch's.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            momentum = [self.state[parameter]["momentum_buffer"] for parameter in updated] if group["momentum"] else []
            moved = [parameter.dim() == 4 and not parameter.is_contiguous() for parameter in updated]
            sgd(
                _move(updated, moved),
                _move([parameter.grad for parameter in updated], moved),
                _move(momentum, moved) if momentum else [],  # type: ignore[arg-type]
                fused=True,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                **{
                    name: group[name]
                    for name in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
                },
            )


def _move(tensors: list[Tensor], moved: list[bool]) -> list[Tensor]:
    return [tensor.permute(0, 2, 3, 1) if move else tensor for tensor, move in zip(tensors, moved, strict=True)]


def build_optimizer(config: OptimConfig, parameters: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of ``optim.optimizer``.

    Args:
        config: rate, momentum, weight decay, which optimizer.
        parameters: what it updates.
        device: where they are.

    Raises:
        ValueError: NVIDIA's apex is asked for and not installed.
    """
    options: dict[str, Any] = {"momentum": config.momentum, "weight_decay": config.weight_decay, "lr": config.lr}
    if config.optimizer == "sgd":
        kind = ChannelsLastSGD if device.type == "cpu" else torch.optim.SGD
        optimizer = kind(parameters, fused=True, **options)
        # Left to itself it takes uninitialized memory for momentum, which stays so where the gradient scaler skips the
        # first step (fp16 overflows there). From zeros the first step is the same.
        for parameter in parameters if config.momentum else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    try:
        from apex.optimizers import FusedSGD
    except ImportError as error:
        raise ValueError(
            "optim.optimizer='apex_fused_sgd' needs NVIDIA's apex, built from its own repository; the package named "
            "apex on PyPI is an unrelated web toolkit. Use optim.optimizer=sgd, which is fused as well"
        ) from error
    fused: torch.optim.Optimizer = FusedSGD(parameters, **options)
    return fused
