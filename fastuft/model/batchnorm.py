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


def set_batchnorm_mode(module: Module, mode: str, group: int = 32) -> Module:
    """Put every BatchNorm2d of ``module`` into a mode, keeping parameters, buffers and state-dict keys.

    Args:
        module: the module, which is changed in place if possible; use the returned one.
        mode: plain; split (groups of ``group``); sync (statistics over all ranks, CUDA only). shuffle is plain here,
            because the trainer exchanges the samples.
        group: samples per group in split mode.

    Raises:
        ValueError: an unknown mode.
    """
    if mode == "sync":
        converted: Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return converted
    if mode not in ("plain", "shuffle", "split"):
        raise ValueError(f"model.bn={mode!r} is not allowed here; choose one of 'plain', 'split', 'shuffle', 'sync'")
    for child in module.modules():
        if type(child) in (nn.BatchNorm2d, SplitBatchNorm2d):
            # Parameters, buffers and attributes stay the same; only the rule for training statistics changes.
            child.__class__ = SplitBatchNorm2d if mode == "split" else nn.BatchNorm2d
            if isinstance(child, SplitBatchNorm2d):
                child.group = group
    return module
