"""Rows in 8-bit floating point (e4m3), each with a scale: half the memory of bf16.

A row is ``scale * codes``. The elements of a unit row are rounded after multiplication by a common power of two, because a
floating-point format has the same relative precision at every scale. The row's own scale then restores its length, which
rounding has changed. Without it, the length would cause most of the error in the loss: keys are close together, so an error of
length changes all scores in the same direction.

Codes are kept as uint8, which every backend copies, sends and saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_UNIT_SCALE = 256.0  # elements of unit rows times this stay below the largest code's value, 448


def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [N, D] uint8, scales [N] fp32) of rows [N, D] with a length of at most 1; a NaN makes its row NaN."""
    rows = rows.float()
    codes = (rows * _UNIT_SCALE).to(FP8)
    length = torch.linalg.vector_norm(codes.float(), dim=1)
    scales = torch.linalg.vector_norm(rows, dim=1) / length
    return codes.view(torch.uint8), torch.where(length == 0, 0, scales)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows [N, D] in dtype, from codes [N, D] uint8 and scales [N]."""
    return codes.view(FP8).to(dtype) * scales.to(dtype)[:, None]
