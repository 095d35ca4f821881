"""The optimizer of a run: torch's fused SGD or AdamW, timm's LARS, or apex's SGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fastuft.config import OptimConfig
from fastuft.trainer.parameter_groups import Parameters


class ChannelsLastSGD(torch.optim.SGD):
    """torch's fused SGD for a CPU, without the copies that its kernel makes of tensors that are not contiguous.

    Weights in channels_last are not contiguous; with permuted axes they are, and the update is elementwise. It takes half the
    time on a ResNet-18. The state and its layout are torch's.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            momentum = [_momentum(self, parameter) for parameter in updated] if group["momentum"] else []
            moved = _moved(updated)
            sgd(
                _move(updated, moved),
                _move([parameter.grad for parameter in updated], moved),
                _move(momentum, moved) if momentum else [],  # type: ignore[arg-type]
                fused=True,
                **_scaling(self),
                **{
                    name: group[name]
                    for name in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
                },
            )


class ChannelsLastAdamW(torch.optim.AdamW):
    """torch's fused AdamW for a CPU, without copies of tensors that are not contiguous, as :class:`ChannelsLastSGD`."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in updated:
                if not self.state[parameter]:
                    average, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
                    self.state[parameter] |= {"step": torch.zeros(()), "exp_avg": average, "exp_avg_sq": square}
            states, moved = [self.state[parameter] for parameter in updated], _moved(updated)
            beta1, beta2 = group["betas"]
            adamw(
                _move(updated, moved),
                _move([parameter.grad for parameter in updated], moved),
                _move([state["exp_avg"] for state in states], moved),
                _move([state["exp_avg_sq"] for state in states], moved),
                [],
                [state["step"] for state in states],
                fused=True,
                **_scaling(self),
                beta1=beta1,
                beta2=beta2,
                **{name: group[name] for name in ("amsgrad", "lr", "weight_decay", "eps", "maximize")},
            )


def _scaling(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The attributes that torch's gradient scaler sets on a fused optimizer."""
    return {name: getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")}


def _momentum(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """A parameter's momentum, zero at first.

    Fused SGD itself would allocate it uninitialized and leave it so if the gradient scaler skips the first step, which often
    overflows in fp16. Starting from zeros gives the same first step.
    """
    state = optimizer.state[parameter]
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    momentum: Tensor = state["momentum_buffer"]
    return momentum


def _moved(tensors: Sequence[Tensor]) -> list[bool]:
    return [tensor.dim() == 4 and not tensor.is_contiguous() for tensor in tensors]


def _move(tensors: Sequence[Tensor], moved: list[bool]) -> list[Tensor]:
    return [tensor.permute(0, 2, 3, 1) if move else tensor for tensor, move in zip(tensors, moved, strict=True)]


def build_optimizer(config: OptimConfig, parameters: Parameters, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of ``optim.optimizer``.

    Args:
        config: the optimizer with its rate, momentum and weight decay.
        parameters: the parameters to update, from :func:`parameter_groups`.
        device: device of the parameters.

    Raises:
        ValueError: the optimizer's package is not installed.
    """
    common: dict[str, Any] = {"weight_decay": config.weight_decay, "lr": config.lr}
    on_cpu = device.type == "cpu"
    if config.optimizer == "sgd":
        kind = ChannelsLastSGD if on_cpu else torch.optim.SGD
        optimizer = kind(parameters, fused=True, momentum=config.momentum, **common)
        for group in optimizer.param_groups if config.momentum else ():
            for parameter in group["params"]:
                _momentum(optimizer, parameter)
        return optimizer
    if config.optimizer == "adamw":
        return (ChannelsLastAdamW if on_cpu else torch.optim.AdamW)(
            parameters, fused=True, betas=config.betas, **common
        )
    return (_lars if config.optimizer == "lars" else _apex)(parameters, momentum=config.momentum, **common)


def _lars(parameters: Parameters, **options: object) -> torch.optim.Optimizer:
    """timm's LARS. timm is maintained and an extra already; it updates all tensors in one call on a GPU and keeps SGD's state.

    The rate is adapted for every tensor that may decay, even at a weight decay of 0.
    """
    try:
        from timm.optim import Lars
    except ImportError as error:
        raise ValueError(
            "optim.optimizer='lars' needs timm; pip install 'fastuft[timm]', or choose sgd or adamw"
        ) from error
    groups = [
        {**group, "always_adapt": "weight_decay" not in group} if isinstance(group, dict) else group
        for group in parameters
    ]
    built: torch.optim.Optimizer = Lars(groups, **options)
    return built


def _apex(parameters: Parameters, **options: object) -> torch.optim.Optimizer:
    try:
        from apex.optimizers import FusedSGD
    except ImportError as error:
        raise ValueError(
            "optim.optimizer='apex_fused_sgd' needs NVIDIA's apex, built from its own repository; the package named "
            "apex on PyPI is an unrelated web toolkit. Use optim.optimizer=sgd, which is fused as well"
        ) from error
    fused: torch.optim.Optimizer = FusedSGD(parameters, **options)
    return fused


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load averages and counts from a checkpoint, but keep this run's settings, which torch would replace."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
