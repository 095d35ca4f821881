"""How the kernels in this folder read rows of queries and keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unit_rows(h):
    """(h / |h|, 1 / |h| or 0) for rows h [R, D] fp32; squares of scaled rows neither overflow nor underflow."""
    largest = tl.maximum(tl.max(tl.abs(h), 1), 1.1754944e-38)
    scaled = h / largest[:, None]
    relative = tl.sqrt(tl.sum(scaled * scaled, 1))
    short = relative * largest < 1e-12
    safe = tl.where(short, 1.0, relative)
    z = tl.where(short[:, None], h * 1e12, scaled / safe[:, None])
    return z, tl.where(short, 0.0, 1.0 / (safe * largest))


@triton.jit
def load_rows(ptr, stride, rows, columns, num_rows, width):
    """Rows [R, D] as fp32; rows and columns outside are 0."""
    inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], inside, 0.0).to(tl.float32)
