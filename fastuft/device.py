"""Device and precision: one rule for training and evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp16", "fp32"]
QueueDtype = Literal["auto", "fp32", "bf16", "fp16", "fp8"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_QUEUE_DTYPES: dict[QueueDtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


def choose_device(name: str, *, option: str = "device", index: int = 0) -> torch.device:
    """The device that ``name`` (auto, cuda or cpu) means here; auto is the GPU with this index if there is one.

    Args:
        name: auto, cuda or cpu.
        option: name of the user's option, for the message.
        index: the GPU's index on this machine.

    Raises:
        ValueError: ``cuda`` on a machine without CUDA.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{option}='cuda' but torch sees no CUDA device; `fastuft doctor` says why, or use auto or cpu"
        )
    return torch.device("cuda", index) if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def resolve_precision(precision: Precision, device: torch.device) -> Literal["bf16", "fp16", "fp32"]:
    """bf16, fp16 or fp32; ``auto`` is bf16 on a GPU and fp32 on a CPU.

    Raises:
        ValueError: any other name.
    """
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if precision not in DTYPES:
        raise ValueError(f"precision={precision!r} is not allowed; choose one of 'auto', 'bf16', 'fp16', 'fp32'")
    return precision


def queue_dtype(kind: QueueDtype, precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of a queue of keys; auto is fp32 on a CPU, and on a GPU the dtype of its matrix products."""
    if kind != "auto":
        return _QUEUE_DTYPES[kind]
    return DTYPES[resolve_precision(precision, device)] if device.type == "cuda" else torch.float32


def queue_dtype_name(dtype: torch.dtype) -> QueueDtype:
    """The name of a queue's dtype in the options."""
    return next(name for name, known in _QUEUE_DTYPES.items() if known == dtype)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """bf16 or fp16 forward passes on ``device``; fp32 switches autocast off."""
    dtype = DTYPES[resolve_precision(precision, device)]
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)
