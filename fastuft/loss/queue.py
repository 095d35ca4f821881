"""The queue of keys: MoCo's negatives, on the device and saved with the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn

from fastuft.loss import fp8, ops, portable
from fastuft.loss.portable import normalize_rows

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, fp8.FP8, torch.float64)


class KeyQueue(nn.Module):
    """The last ``size`` keys as unit rows, in persistent buffers, so a resumed run continues with the same negatives.

    It starts with random unit rows. Pass the queue (or ``queue.keys``) to the loss first and call ``queue.enqueue_(k)``
    afterwards, so that a query never meets its own key as a negative; no copy of the queue is needed.

    Args:
        size: K, the number of rows.
        dim: D, width of a key.
        generator: generator of the random start.
        dtype: dtype of the rows. Half precision halves the sweep's memory traffic, and unit rows lose little by it.
            torch.float8_e4m3fn halves it again, with a scale per row (:mod:`fastuft.loss.fp8`); docs/loss.md has the errors.
        device: device of the buffers.
        gather_distributed: with several processes (torch.distributed), whether :meth:`enqueue_` takes the keys of all of
            them, which must have equally many (True), or only the given keys, because the caller has gathered them or each
            process has its own queue (False). DistributedDataParallel replaces every queue with the first process's before
            each forward pass (``broadcast_buffers``), so keys that were not gathered are lost.

    Attributes:
        keys: unit rows [K, D]; in fp8 their codes as uint8, for which the queue itself must be passed to a loss.
        scales: scales of an fp8 queue, [K] fp32, otherwise None.
        pointer: the row for the next key, int64 scalar.

    Raises:
        ValueError: a size is not a positive integer, the dtype is not allowed, or ``gather_distributed=True`` but PyTorch has
            no torch.distributed.
    """

    keys: Tensor
    scales: Tensor | None
    pointer: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        gather_distributed: bool | None = None,
    ) -> None:
        super().__init__()
        if gather_distributed and not distributed.is_available():
            raise ValueError(
                "gather_distributed=True needs torch.distributed, which this PyTorch lacks; set it to False"
            )
        self.gather_distributed = gather_distributed
        for name, value in (("size", size), ("dim", dim)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is out of range; it must be a positive integer")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype} is not allowed; choose one of {', '.join(map(str, _DTYPES))}")
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        rows = torch.randn(
            size, dim, generator=generator, dtype=compute, device=generator.device if generator else device
        )
        keys, scales = normalize_rows(rows)[0].to(device), None
        if dtype == fp8.FP8:
            keys, scales = fp8.encode(keys)
        else:
            keys = keys.to(dtype)
        self.register_buffer("keys", keys)
        self.register_buffer("scales", scales)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64, device=device))

    def extra_repr(self) -> str:
        kind = "" if self.scales is None else ", fp8"
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}{kind}"

    @property
    def dtype(self) -> torch.dtype:
        """What the queue was made for: the dtype of ``keys``, or torch.float8_e4m3fn."""
        return self.keys.dtype if self.scales is None else fp8.FP8

    def rows(self) -> Tensor:
        """The unit rows [K, D] as a matrix: ``keys``, or a decoded float32 copy for an fp8 queue."""
        return self.keys if self.scales is None else fp8.decode(self.keys, self.scales)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casting a model to half precision must not change the scales of its fp8 queue.
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scales is not None and self.scales is not None:
            self.scales = scales.to(self.scales.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Load as usual, after encoding or decoding the rows if the saved queue is of the other kind."""
        keys, scales = state_dict.get(f"{prefix}keys"), state_dict.get(f"{prefix}scales")
        if keys is not None and self.scales is None and scales is not None:
            state_dict[f"{prefix}keys"] = fp8.decode(keys, state_dict.pop(f"{prefix}scales"))
        elif keys is not None and self.scales is not None and scales is None and keys.is_floating_point():
            state_dict[f"{prefix}keys"], state_dict[f"{prefix}scales"] = fp8.encode(keys)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def enqueue_(self, keys: Tensor) -> None:
        """Normalize keys [B, D] and overwrite the oldest rows with them, wrapping; of more than K keys, the last K stay.

        There is no host synchronization, because the pointer is on the device.

        Raises:
            ValueError: not a float matrix, a width or device other than the queue's, or several processes without
                ``gather_distributed``.
        """
        queue = self.keys  # read once: a buffer of a module is found last
        dim = queue.shape[1]
        if keys.ndim != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys has shape {tuple(keys.shape)}; it must be [B, {dim}]")
        if not keys.is_floating_point():
            raise ValueError(f"keys has dtype {keys.dtype}; it must be a floating-point dtype")
        if keys.device != queue.device:
            raise ValueError(f"keys is on {keys.device} but the queue is on {queue.device}; move one of them")
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            keys = self._of_all_processes(keys.detach())
        if type(keys) is Tensor and keys.device.type == "cpu" and not torch.compiler.is_compiling():
            write = portable.enqueue_  # the operator's dispatch would take a fifth of the call
        else:
            write = ops.enqueue_
        write(queue, self.scales, self.pointer, keys.detach())

    def _of_all_processes(self, keys: Tensor) -> Tensor:
        if self.gather_distributed is None:
            raise ValueError(
                f"gather_distributed=None is not allowed with several processes, of which there are "
                f"{distributed.get_world_size()}: build the KeyQueue with gather_distributed=True to take the keys of all of "
                "them, or with False if its keys are already gathered"
            )
        if not self.gather_distributed:
            return keys
        parts = [torch.empty_like(keys) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, keys.contiguous())
        return torch.cat(parts)
