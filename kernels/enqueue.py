"""Write keys into the ring buffer of a queue: normalized, wrapping, without the host knowing where.

    queue[(pointer + i) mod K] = k_i / max(|k_i|, 1e-12),   pointer <- (pointer + B) mod K

Of B > K keys the last K are written. Equals, for B <= K::

    queue[(pointer + torch.arange(B)) % K] = F.normalize(keys.float(), dim=1).to(queue.dtype)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuft.kernels.rows import load_rows, unit_rows

_ROWS = 4


@triton.jit
def enqueue_kernel(
    queue_ptr,  # [K, D]
    pointer_ptr,  # int64 scalar
    keys_ptr,  # [B, D]
    queue_stride,
    keys_stride,
    num_rows,  # B
    skipped,  # max(B - K, 0)
    size,  # K
    width,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_R rows of the keys that stay."""
    rows = skipped + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    key = load_rows(keys_ptr, keys_stride, rows, columns, num_rows, width)
    if NORMALIZE:
        key, _ = unit_rows(key)
    places = (tl.load(pointer_ptr) + rows) % size
    inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    p_out = queue_ptr + places[:, None] * queue_stride + columns[None, :]
    tl.store(p_out, key.to(queue_ptr.dtype.element_ty), inside)


@triton.jit
def advance_kernel(pointer_ptr, num_rows, size):
    """The pointer moves only when every program of the launch before has read it."""
    tl.store(pointer_ptr, (tl.load(pointer_ptr) + num_rows) % size)


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, normalize: bool = True) -> None:
    """Write keys [B, D] into queue [K, D] from ``pointer`` (int64 scalar on the device) on, and advance it."""
    num_rows, width = keys.shape
    if num_rows == 0:
        return
    if keys.stride(1) != 1 and width > 1:
        keys = keys.contiguous()
    size = queue.shape[0]
    skipped = max(num_rows - size, 0)
    with torch.cuda.device_of(queue):
        enqueue_kernel[(triton.cdiv(num_rows - skipped, _ROWS),)](
            queue, pointer, keys, queue.stride(0), keys.stride(0), num_rows, skipped, size, width, normalize, _ROWS,
            triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
        advance_kernel[(1,)](pointer, num_rows, size, num_warps=1)
