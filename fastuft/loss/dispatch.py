"""Which path computes a loss: the fused kernels or the portable one."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from fastuft import fused
from fastuft.kernels.problem import tile_precision

_reasons: dict[tuple[object, ...], str | None] = {}


def fused_reason(q: Tensor, queue: Tensor) -> str | None:
    """Why the fused kernels cannot take tensors of this kind, or None if they can; determined once per kind."""
    kind = (q.device, q.dtype, queue.dtype, q.shape[1])
    if kind not in _reasons:
        if fused.triton_installed():
            from fastuft.kernels import queue_sweep

            _reasons[kind] = queue_sweep.unsupported(q, queue)
        else:
            _reasons[kind] = "Triton is not installed (pip install triton)"
    return _reasons[kind]


def use_fused(impl: str, q: Tensor, queue: Tensor, *keys: Tensor | None) -> bool:
    """Whether the kernels run; with impl='auto', only on CUDA.

    Raises:
        ValueError: impl='triton', but they cannot run.
    """
    if impl == "torch" or (impl == "auto" and not q.is_cuda):
        return False
    reason = fused.refusal(fused.LOSS, fused.GRADIENT) or fused_reason(q, queue)
    if reason is None and any(key is not None and key.dtype == torch.float64 for key in keys):
        reason = "a key is float64"
    if reason is not None and impl == "triton":
        raise ValueError(f"impl='triton' cannot run: {reason}; use impl='torch' or 'auto'")
    return reason is None


@functools.cache
def _tell_of_exact_products() -> None:
    """Warn once per process."""
    warnings.warn(
        "query and queue are both float32, and precision='auto' multiplies them exactly, without tensor cores. Run the loss "
        "under torch.autocast, keep the queue in half precision (KeyQueue(dtype=torch.bfloat16)), or pass precision='bf16' or "
        "'tf32'; precision='ieee' keeps the exact products without this warning.",
        RuntimeWarning,
        stacklevel=2,
    )


def warn_of_exact_products(precision: str, query: Tensor, queue: Tensor) -> None:
    """Warn, once per process, that the tensor cores stay unused because nobody chose a precision."""
    if precision == "auto" and tile_precision(precision, query.dtype, queue.dtype) == "ieee":
        _tell_of_exact_products()
