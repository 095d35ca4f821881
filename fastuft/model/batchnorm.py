"""BatchNorm over virtual sub-batches, which hides which samples share a batch on one device.

If a query and its key share batch statistics, the network can match them by these. MoCo shuffles samples across GPUs. On one
device, statistics over groups of the batch, in an order that differs between queries and keys, serve the same purpose. The
keys of the state dict are those of BatchNorm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastuft.kernels.problem import BatchNorm
from fastuft.model.grouped_batchnorm import grouped_batch_norm

Module = TypeVar("Module", bound=nn.Module)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics cover groups of ``group`` consecutive samples.

    It equals applying BatchNorm to each group with the same affine parameters. Running statistics move toward the mean of the
    groups' statistics, once per call. In eval mode it is plain BatchNorm.

    Args:
        group: samples per group; the batch size must be a multiple of it.
    """

    group: int = 32

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalize x [B, C, H, W], keeping its memory format; with ``relu``, then add ``residual`` and take the ReLU.

        Raises:
            ValueError: in training, a batch that the group does not divide.
        """
        if not self.training:
            return _activate(super().forward(x), residual, relu)
        if x.shape[0] % self.group:
            raise ValueError(
                f"batch of {x.shape[0]} images does not divide into statistics groups of {self.group}; "
                "set model.bn_group to a divisor of the batch of one device, or model.bn to plain"
            )
        normalized, means, variances, _ = grouped_batch_norm(
            BatchNorm(x, self.weight, self.bias, residual, self.group, self.eps, relu)
        )
        mean, variance, count = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is not None and variance is not None and count is not None:
            _note_statistics(Statistics(mean, variance, count, self.momentum, means, variances))
        return normalized


class _WithActivation(nn.Module):
    """What follows the statistics in layers like timm's BatchNormAct2d: ``drop``, then ``act``."""

    drop: nn.Module
    act: nn.Module


class SplitBatchNormAct2d(SplitBatchNorm2d, _WithActivation):
    """The same for a layer that has its activation inside; ReLU is fused.

    Args:
        whole: class of the layer with statistics over the whole batch.
    """

    whole: type[nn.BatchNorm2d]

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        if residual is not None or relu:
            raise ValueError("a layer with its own activation takes neither a residual nor a second activation")
        if type(self.drop) is nn.Identity and type(self.act) is nn.ReLU:
            return super().forward(x, relu=True)
        activated: Tensor = self.act(self.drop(super().forward(x)))
        return activated


class SyncBatchNormAct(nn.SyncBatchNorm, _WithActivation):
    """Statistics over all ranks, for such a layer."""

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.act(self.drop(super().forward(x)))
        return activated


class Statistics(NamedTuple):
    """A layer's running statistics [C], and the means and variances of its groups, toward which they move."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float | None
    means: Tensor  # [groups, C]
    variances: Tensor  # [groups, C], unbiased


_waiting: ContextVar[list[Statistics] | None] = ContextVar("statistics of the layers of the current pass", default=None)


@contextmanager
def one_statistics_update() -> Iterator[None]:
    """Update the running statistics of all layers called inside together, at the end.

    Updating them layer by layer takes nine operators per layer.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the updates
        yield
        return
    statistics: list[Statistics] = []
    token = _waiting.set(statistics)
    try:
        yield
    finally:
        _waiting.reset(token)
    _move_running_statistics(statistics)


@contextmanager
def statistics_inside_only(module: nn.Module) -> Iterator[None]:
    """Update the running statistics of ``module`` only in calls made inside, not when the backward pass repeats a call.

    The backward pass may repeat a call at any time after the block, so updates stay off until the next block. A repeated call
    must save the same tensors; it therefore computes the update too, with momentum 0.
    """
    layers = [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.__dict__.pop(_COUNT, None)
        layer.momentum = layer.__dict__.pop(_MOMENTUM, layer.momentum)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__[_MOMENTUM], layer.momentum = layer.momentum, 0.0
            layer.__dict__[_COUNT] = None  # hides the buffer, which stays in the state dict


_COUNT, _MOMENTUM = "num_batches_tracked", "_momentum_inside"


def _note_statistics(statistics: Statistics) -> None:
    waiting = None if torch.compiler.is_compiling() else _waiting.get()
    if waiting is None:
        _move_running_statistics([statistics])
    else:
        waiting.append(statistics)


@torch.no_grad()
def _move_running_statistics(statistics: list[Statistics]) -> None:
    """Move every layer's running statistics toward the mean of its groups' statistics."""
    kinds: dict[tuple[float | None, int], list[Statistics]] = {}
    for layer in statistics:
        kinds.setdefault((layer.momentum, len(layer.means)), []).append(layer)
    for (momentum, _), layers in kinds.items():
        counts = [layer.num_batches_tracked for layer in layers]
        torch._foreach_add_(counts, 1)
        found = [layer.means for layer in layers] + [layer.variances for layer in layers]
        averages = torch.cat(found, 1).mean(0).split([part.shape[1] for part in found])
        running = [layer.running_mean for layer in layers] + [layer.running_var for layer in layers]
        if momentum is None:  # the cumulative average, as in nn.BatchNorm2d
            for buffer, average, count in zip(running, averages, counts * 2, strict=True):
                buffer.lerp_(average, 1.0 / count)
        else:
            torch._foreach_lerp_(running, averages, momentum)


def _activate(x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        x = x + residual
    return F.relu(x, inplace=True) if relu else x


def norm_relu(bn: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(bn(x) + residual), as one operator if statistics are per group."""
    if isinstance(bn, SplitBatchNorm2d):
        activated: Tensor = bn(x, residual, relu=True)
        return activated
    return _activate(bn(x), residual, relu=True)


def has_batchnorm(module: nn.Module) -> bool:
    """Whether a module computes statistics over the batch."""
    return any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())


def grouped_channels(module: nn.Module) -> tuple[int, ...]:
    """Distinct numbers of channels of the layers with statistics per group, ascending."""
    return tuple(sorted({child.num_features for child in module.modules() if isinstance(child, SplitBatchNorm2d)}))


def _has_activation(layer: nn.Module) -> bool:
    """Whether a BatchNorm2d of another class is one with ``drop`` and ``act`` behind it, as timm's BatchNormAct2d is.

    Raises:
        ValueError: it is of a class that does something else.
    """
    kind = type(layer)
    if not isinstance(layer, nn.BatchNorm2d) or kind in (nn.BatchNorm2d, SplitBatchNorm2d):
        return False
    if kind is SplitBatchNormAct2d or kind.__name__ == "BatchNormAct2d":
        return True
    raise ValueError(
        f"the network has layers of type {kind.__module__}.{kind.__qualname__}, a BatchNorm2d with a rule of its own, "
        "whose statistics cannot be changed; set model.bn to plain, or to shuffle with several ranks"
    )


def _synchronized(module: Module) -> Module:
    """The module with statistics over all ranks; PyTorch's own conversion would lose activations."""
    behind = {name: (layer.drop, layer.act) for name, layer in module.named_modules() if _has_activation(layer)}
    converted: Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, (drop, act) in behind.items():
        layer = converted.get_submodule(name)
        layer.__class__ = SyncBatchNormAct
        layer.drop, layer.act = drop, act
    return converted


def set_batchnorm_mode(module: Module, mode: str, group: int = 32) -> Module:
    """Put every BatchNorm2d of ``module`` into a mode, keeping parameters, buffers and state-dict keys.

    Args:
        module: the module, which is changed in place if possible; use the returned one.
        mode: plain; split (groups of ``group``); sync (statistics over all ranks, CUDA only). shuffle is plain here,
            because the trainer exchanges the samples.
        group: samples per group in split mode.

    Raises:
        ValueError: an unknown mode; split or sync with a layer that is a BatchNorm2d with a rule of its own.
    """
    if mode == "sync":
        return _synchronized(module)
    if mode not in ("plain", "shuffle", "split"):
        raise ValueError(f"model.bn={mode!r} is not allowed here; choose one of 'plain', 'split', 'shuffle', 'sync'")
    activated = set(filter(_has_activation, module.modules())) if mode == "split" else set()
    for child in module.modules():
        # Parameters, buffers and attributes stay the same; only the rule for training statistics changes.
        if type(child) in (nn.BatchNorm2d, SplitBatchNorm2d):
            child.__class__ = SplitBatchNorm2d if mode == "split" else nn.BatchNorm2d
        elif isinstance(child, SplitBatchNormAct2d):
            if mode != "split":
                setattr(child, "__class__", child.whole)  # noqa: B010 (of a class that types do not know)
        elif child in activated:
            setattr(child, "whole", type(child))  # noqa: B010
            child.__class__ = SplitBatchNormAct2d
        if isinstance(child, SplitBatchNorm2d):
            child.group = group
    return module
