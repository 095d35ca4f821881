"""Module forms of the losses: the same arguments, split between construction and call."""

from __future__ import annotations

from torch import Tensor, nn

from fastuft.loss.functional import (
    Impl,
    Reduction,
    _check_impl,
    _check_reduction,
    _check_temperature,
    info_nce,
    mixed_info_nce,
)


class _QueueLoss(nn.Module):
    """Options that both losses share.

    Args:
        temperature: tau.
        normalize: L2-normalize queries and keys inside.
        reduction: mean, sum or none.
        impl: auto, triton or torch.
    """

    def __init__(
        self,
        temperature: float = 0.2,
        *,
        normalize: bool = True,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        _check_reduction(reduction)
        _check_impl(impl)
        self.temperature = _check_temperature(temperature)
        self.normalize = normalize
        self.reduction: Reduction = reduction
        self.impl: Impl = impl

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, normalize={self.normalize}, reduction={self.reduction!r}, impl={self.impl!r}"


class InfoNCELoss(_QueueLoss):
    """:func:`fastuft.info_nce` as a module (Eq. 4)."""

    def forward(self, q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        """Loss of queries q [B, D] with keys k [B, D] against queue [K, D]."""
        options = {"normalize": self.normalize, "reduction": self.reduction, "impl": self.impl}
        return info_nce(q, k, queue, self.temperature, **options)  # type: ignore[arg-type]


class MixedInfoNCELoss(_QueueLoss):
    """:func:`fastuft.mixed_info_nce` as a module (Eq. 6)."""

    def forward(self, q: Tensor, k_a: Tensor, k_b: Tensor, lam: float | Tensor, queue: Tensor) -> Tensor:
        """Loss of mixed queries q [B, D] with keys k_a, k_b [B, D] of weight lam, 1 - lam against queue [K, D]."""
        options = {"normalize": self.normalize, "reduction": self.reduction, "impl": self.impl}
        return mixed_info_nce(q, k_a, k_b, lam, queue, self.temperature, **options)  # type: ignore[arg-type]
