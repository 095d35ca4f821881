"""Drop-in for lightly's memory-bank loss: the same constructor and call, fused, with a bank that is saved with the model.

The one-line change::

    - from lightly.loss import NTXentLoss
    + from fastuft.loss.lightly import NTXentLoss
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastuft.loss.functional import info_nce
from fastuft.loss.options import Impl, LossOptions
from fastuft.loss.queue import KeyQueue


class NTXentLoss(nn.Module):
    """``lightly.loss.NTXentLoss`` with a memory bank, equal to Eq. 4.

    Unlike in lightly's, the bank is in the state dict (so it survives a resume), batches that wrap around its end lose no
    rows, and keys get no gradient (lightly's passes one to ``out1``; MoCo's keys have none).

    Args:
        temperature: tau; lightly's default, 0.5.
        memory_bank_size: (K, D). lightly's in-batch mode, 0, is a different loss without a queue and is refused.
        gather_distributed: whether the bank takes the keys of all processes, which must have equally many.
        impl: as for :func:`fastuft.info_nce`.

    Raises:
        ValueError: ``memory_bank_size`` is not (K, D), the temperature is not positive, or torch.distributed is missing.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        sizes = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if sizes[:1] == (0,):
            raise ValueError(
                f"memory_bank_size={memory_bank_size} is not allowed: 0 takes the negatives from the batch, which is a "
                "different loss without a queue; use lightly's own for it, or give (K, D), e.g. (65536, 128)"
            )
        if len(sizes) != 2:
            raise ValueError(
                f"memory_bank_size={memory_bank_size} is not allowed: the bank needs both sizes; give (K, D), e.g. (65536, 128)"
            )
        self.options = LossOptions(temperature, impl=impl)
        self.memory_bank = KeyQueue(*sizes, gather_distributed=gather_distributed)

    def extra_repr(self) -> str:
        return f"temperature={self.options.temperature}, gather_distributed={self.memory_bank.gather_distributed}"

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of queries out0 [B, D] with keys out1 [B, D]; then, if out0 requires grad, the bank takes out1."""
        keys = out1.detach()
        loss = info_nce(out0, keys, self.memory_bank, **vars(self.options))
        if out0.requires_grad:
            self.memory_bank.enqueue_(keys)
        return loss
