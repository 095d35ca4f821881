"""The queue of keys: MoCo's negatives, kept on the device and saved with the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastuft.loss import ops
from fastuft.loss.portable import normalize_rows


class KeyQueue(nn.Module):
    """The last ``size`` keys as unit rows, in persistent buffers: a resumed run goes on with the same negatives.

    Starts from random unit rows. Use ``queue.keys`` in the loss first and ``queue.enqueue_(k)`` after it, so that a query
    never meets its own key as a negative; no copy of the queue is needed.

    Args:
        size: K, rows kept.
        dim: D, width of a key.
        generator: of the random start.
        dtype: of the rows. Half precision halves the sweep's traffic; unit rows lose little by it.
        device: of the buffers.

    Attributes:
        keys: [K, D] unit rows.
        pointer: int64 scalar, the row that the next key is written to.

    Raises:
        ValueError: a size that is not a positive integer, or a dtype that is not a floating-point one.
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
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} is not allowed; choose a floating-point one")
        compute = torch.promote_types(dtype, torch.float32)
        rows = torch.randn(
            size, dim, generator=generator, dtype=compute, device=generator.device if generator else device
        )
        self.register_buffer("keys", normalize_rows(rows)[0].to(device=device, dtype=dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64, device=device))

    def extra_repr(self) -> str:
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}"

    @torch.no_grad()
    def enqueue_(self, keys: Tensor) -> None:
        """Normalize keys [B, D] and write them over the oldest rows, wrapping; of more than K, the last K stay.

        No host synchronization: the pointer lives on the device.

        Raises:
            ValueError: not a float matrix, or another width or device than the queue's.
        """
        dim = self.keys.shape[1]
        if keys.ndim != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys has shape {tuple(keys.shape)}; it must be [B, {dim}]")
        if not keys.is_floating_point():
            raise ValueError(f"keys has dtype {keys.dtype}; it must be a floating-point one")
        if keys.device != self.keys.device:
            raise ValueError(f"keys is on {keys.device} and the queue on {self.keys.device}; move one of them")
        ops.enqueue_(self.keys, self.pointer, keys)
