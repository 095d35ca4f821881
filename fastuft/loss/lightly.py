"""Drop-in for lightly's memory-bank loss: the same constructor and call, fused, with a bank that survives a restart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastuft.loss.functional import Impl, info_nce
from fastuft.loss.queue import KeyQueue


class NTXentLoss(nn.Module):
    """``lightly.loss.NTXentLoss`` with a memory bank, equal to Eq. 4.

    Unlike lightly's, the bank is in the state dict (so it is there after a resume), batches that wrap around its end lose
    no rows, and keys take no gradient.

    Args:
        temperature: tau; lightly's default, 0.5.
        memory_bank_size: (K, D). lightly's in-batch mode, 0, is another loss without a queue and is refused.
        gather_distributed: the bank takes the keys of all processes.
        impl: as for :func:`fastuft.info_nce`.
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
        if isinstance(memory_bank_size, int):
            reason = (
                "0 means in-batch negatives, which is a loss without a queue: keep lightly's own for it"
                if memory_bank_size == 0
                else "the bank is saved with the model, so its width must be known"
            )
            raise ValueError(
                f"memory_bank_size={memory_bank_size} is not allowed: {reason}; give (K, D), e.g. (65536, 128)"
            )
        size, dim = memory_bank_size
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.impl: Impl = impl
        self.bank = KeyQueue(size, dim)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Loss of queries out0 [B, D] with keys out1 [B, D]; the bank takes out1 when out0 requires grad."""
        keys = out1.detach()
        loss = info_nce(out0, keys, self.bank.keys, self.temperature, impl=self.impl)
        if out0.requires_grad:
            if self.gather_distributed and torch.distributed.is_initialized():
                parts = [torch.empty_like(keys) for _ in range(torch.distributed.get_world_size())]
                torch.distributed.all_gather(parts, keys.contiguous())
                keys = torch.cat(parts)
            self.bank.enqueue_(keys)
        return loss
