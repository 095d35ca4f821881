"""Rows in 8-bit floating point (e4m3), each with a scale: half the memory of bf16.

A row is ``scale * codes``. Elements of a unit row are rounded at a common power of two, since a floating-point format has
the same precision at every scale; the row's own scale then gives it back its length, which rounding has changed. Of the
loss's error that length is the larger part: features of one image lie close together, and so errors of their lengths move
every score alike.

Codes are kept as uint8, which every backend copies, sends and saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_UNIT_SCALE = 256.0  # elements of unit rows times this stay below the largest code's value, 448


def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [N, D] uint8, scales [N] fp32) of rows [N, D] that are no longer than 1; a NaN makes its row NaN."""
    rows = rows.float()
    codes = (rows * _UNIT_SCALE).to(FP8)
    length = torch.linalg.vector_norm(codes.float(), dim=1)
    scales = torch.linalg.vector_norm(rows, dim=1) / length
    return codes.view(torch.uint8), torch.where(length == 0, 0, scales)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows [N, D] in dtype, of codes [N, D] uint8 and scales [N]."""
    return codes.view(FP8).to(dtype) * scales.to(dtype)[:, None]
