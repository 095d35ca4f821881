"""The queue of keys: MoCo's negatives, kept on the device and saved with the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeyQueue(nn.Module):
    """The last ``size`` keys as unit rows, in persistent buffers: a resumed run goes on with the same negatives.

    Starts from random unit rows. Use ``queue.keys`` in the loss first and ``queue.enqueue_(k)`` after it, so that a query
    never meets its own key as a negative; no copy of the queue is needed.

    Args:
        size: K, rows kept.
        dim: D, width of a key.
        generator: of the random start.
        dtype: of the rows.

    Attributes:
        keys: [K, D] unit rows.
        pointer: int64 scalar, the row that the next key is written to.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is out of range; it must be a positive integer")
        rows = torch.randn(size, dim, generator=generator, device=generator.device if generator else device)
        self.register_buffer("keys", F.normalize(rows, dim=1).to(device=device, dtype=dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64, device=device))

    def extra_repr(self) -> str:
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}"

    @torch.no_grad()
    def enqueue_(self, keys: Tensor) -> None:
        """Normalise keys [B, D] and write them over the oldest rows, wrapping; of more than K, the last K stay.

        No host synchronisation: the pointer lives on the device.

        Raises:
            ValueError: another width or device than the queue's.
        """
        size, dim = self.keys.shape
        if keys.ndim != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys has shape {tuple(keys.shape)}; it must be [B, {dim}]")
        if keys.device != self.keys.device:
            raise ValueError(f"keys is on {keys.device} and the queue on {self.keys.device}; move one of them")
        if keys.is_cuda and not torch.compiler.is_compiling():
            from fastuft.loss import ops

            if ops.triton_installed():
                from fastuft.kernels import enqueue

                enqueue.enqueue_(self.keys, self.pointer, keys)
                return
        count = keys.shape[0]
        kept = F.normalize(keys[-size:].float(), dim=1).to(self.keys.dtype)
        first = self.pointer + (count - len(kept))
        rows = (first + torch.arange(len(kept), device=keys.device)) % size
        self.keys.index_copy_(0, rows, kept)
        self.pointer.add_(count).remainder_(size)
