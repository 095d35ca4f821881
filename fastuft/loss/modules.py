"""Module forms of the losses: the same arguments, divided between constructor and call."""

from __future__ import annotations

from torch import Tensor, nn

from fastuft.loss.functional import info_nce, mixed_info_nce
from fastuft.loss.options import Impl, LossOptions, Precision, Reduction
from fastuft.loss.queue import KeyQueue


class _QueueLoss(nn.Module):
    """A loss with its options (:class:`fastuft.loss.LossOptions`)."""

    def __init__(
        self,
        temperature: float = 0.2,
        *,
        normalize: bool = True,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
        precision: Precision = "auto",
        unit_queue: bool = False,
    ) -> None:
        super().__init__()
        self.options = LossOptions(temperature, normalize, reduction, impl, precision, unit_queue)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())


class InfoNCELoss(_QueueLoss):
    """:func:`fastuft.info_nce` as a module (Eq. 4)."""

    def forward(self, q: Tensor, k: Tensor, queue: Tensor | KeyQueue) -> Tensor:
        """Loss of queries q [B, D] with keys k [B, D] against queue [K, D]."""
        return info_nce(q, k, queue, **vars(self.options))


class MixedInfoNCELoss(_QueueLoss):
    """:func:`fastuft.mixed_info_nce` as a module (Eq. 6)."""

    def forward(self, q: Tensor, k_a: Tensor, k_b: Tensor, lam: float | Tensor, queue: Tensor | KeyQueue) -> Tensor:
        """Loss of mixed queries q [B, D] with keys k_a, k_b [B, D] of weight lam, 1 - lam against queue [K, D]."""
        return mixed_info_nce(q, k_a, k_b, lam, queue, **vars(self.options))
