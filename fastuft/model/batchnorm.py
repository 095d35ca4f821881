"""BatchNorm over virtual sub-batches: hides which samples share a batch, on one device.

A query and its key that share batch statistics can recognize each other by them. MoCo shuffles samples across GPUs;
on one device, statistics over groups of the batch (in an order that differs between the query's and the key's
sub-batches) serve the same end. Keys of the state dict stay BatchNorm's own.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Module = TypeVar("Module", bound=nn.Module)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are taken over groups of ``group`` consecutive samples.

    Equal to applying BatchNorm to each chunk of the batch with the same affine parameters. Running statistics move
    by the mean of the groups' statistics, once a call. In eval mode it is plain BatchNorm.

    Args:
        group: samples a group; the batch must be a multiple of it.
    """

    group: int = 32

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [B, C, H, W], keeping its memory format."""
        if not self.training:
            return super().forward(x)
        if x.shape[0] % self.group:
            raise ValueError(
                f"batch of {x.shape[0]} images does not divide into statistics groups of {self.group}; "
                "set model.bn_group to a divisor of the batch of one device, or model.bn to plain"
            )
        normalized, means, variances = (_fused if torch.compiler.is_compiling() else _by_group)(self, x)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                # momentum=None asks for the cumulative average, as in nn.BatchNorm2d
                moved = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean.lerp_(means.mean(0), moved)
                self.running_var.lerp_(variances.mean(0), moved)
        return normalized


def _by_group(bn: SplitBatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(normalized x, means, unbiased variances [groups, C]) by the backend's own BatchNorm of each group.

    Eagerly several times faster than the formula of ``_fused``, each of whose steps would walk over all of x in fp32.
    """
    parts = x.split(bn.group)
    means = torch.zeros(len(parts), bn.num_features, device=x.device)
    variances = torch.zeros_like(means)
    # With momentum 1 the "running" statistics are this batch's.
    normalized = [
        F.batch_norm(part, means[i], variances[i], bn.weight, bn.bias, True, 1.0, bn.eps)
        for i, part in enumerate(parts)
    ]
    return torch.cat(normalized), means, variances


def _fused(bn: SplitBatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same as one formula, which a compiler turns into two kernels for all groups."""
    grouped = x.unflatten(0, (-1, bn.group))  # a view in channels_last too: [groups, group, C, H, W]
    variance, mean = torch.var_mean(grouped.float(), dim=(1, 3, 4), keepdim=True, correction=0)
    scale = torch.rsqrt(variance + bn.eps)
    if bn.affine:
        scale = scale * bn.weight.view(-1, 1, 1)
        shift = bn.bias.view(-1, 1, 1) - mean * scale
    else:
        shift = -mean * scale
    count = grouped[0].numel() // grouped.shape[2]
    unbiased = variance.detach() * (count / max(count - 1, 1))
    normalized = torch.addcmul(shift, grouped.float(), scale).to(x.dtype).flatten(0, 1)
    return normalized, mean.detach().flatten(1), unbiased.flatten(1)


def has_batchnorm(module: nn.Module) -> bool:
    """Whether any statistics over the batch are taken."""
    return any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())


def set_batchnorm_mode(module: Module, mode: str, group: int = 32) -> Module:
    """Put every BatchNorm2d of ``module`` into a mode, keeping parameters, buffers and state-dict keys.

    Args:
        module: changed in place where possible; use the returned module.
        mode: plain; split (groups of ``group``); sync (statistics over all ranks, CUDA only). shuffle is plain here:
            the trainer exchanges the samples instead.
        group: samples a group of split.
    """
    if mode == "sync":
        converted: Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return converted
    if mode not in ("plain", "shuffle", "split"):
        raise ValueError(f"model.bn={mode!r} is not allowed here; choose one of 'plain', 'split', 'shuffle', 'sync'")
    for child in module.modules():
        if type(child) in (nn.BatchNorm2d, SplitBatchNorm2d):
            # Same parameters, buffers and attributes; only the rule for training statistics changes.
            child.__class__ = SplitBatchNorm2d if mode == "split" else nn.BatchNorm2d
            if isinstance(child, SplitBatchNorm2d):
                child.group = group
    return module
