"""Writes normalized keys into the ring buffer of a queue, without the host knowing the position.

    queue[(pointer + i) mod K] = k_i / max(|k_i|, 1e-12),   pointer <- (pointer + B) mod K

Of B > K keys, the last K are written. Equals, for B <= K and a queue that is not fp8::

    queue[(pointer + torch.arange(B)) % K] = F.normalize(keys.float(), dim=1).to(queue.dtype)

A row of an fp8 queue is codes times a scale, which is the unit row's length divided by that of its codes.

It takes one launch. The pointer may move only after every program has read it: each program adds 2^40 to it when reading, so
its upper bits count the programs, and the last one writes the new pointer. The rows do not depend on the programs' order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuft.kernels.fp8 import UNIT_SCALE, decode, encode
from fastuft.kernels.rows import load_rows, unit_rows

_ROWS = 4


@triton.jit
def enqueue_kernel(
    queue_ptr,  # [K, D]
    scales_ptr,  # [K] fp32, written if FP8
    pointer_ptr,  # int64 scalar
    keys_ptr,  # [B, D]
    queue_stride,
    keys_stride,
    num_rows,  # B
    skipped,  # max(B - K, 0)
    size,  # K
    width,
    FP8: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write BLOCK_R rows of the keys that stay."""
    ticket = tl.atomic_add(pointer_ptr, tl.full([], 1 << 40, tl.int64))
    pointer, came_before = ticket & ((1 << 40) - 1), ticket >> 40
    rows = skipped + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    key, _ = unit_rows(load_rows(keys_ptr, keys_stride, rows, columns, num_rows, width))
    slots = (pointer + rows) % size
    inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    if FP8:
        codes = encode(key * UNIT_SCALE).to(tl.uint8)
        rounded = decode(codes, False)
        length = tl.sqrt(tl.sum(rounded * rounded, 1))
        scale = tl.where(length == 0.0, 0.0, tl.sqrt(tl.sum(key * key, 1)) / length)
        tl.store(scales_ptr + slots, scale, rows < num_rows)
        key = codes
    p_out = queue_ptr + slots[:, None] * queue_stride + columns[None, :]
    tl.store(p_out, key.to(queue_ptr.dtype.element_ty), inside)
    if came_before == tl.num_programs(0) - 1:
        tl.store(pointer_ptr, (pointer + num_rows) % size)


def enqueue_(queue: Tensor, scales: Tensor | None, pointer: Tensor, keys: Tensor) -> None:
    """Write keys [B, D] into queue [K, D] (and its scales [K]) from ``pointer`` (int64 scalar) on, and advance it."""
    num_rows, width = keys.shape
    if num_rows == 0:
        return
    if keys.stride(1) != 1 and width > 1:
        keys = keys.contiguous()
    size = queue.shape[0]
    skipped = max(num_rows - size, 0)
    with torch.cuda.device_of(queue):
        enqueue_kernel[(triton.cdiv(num_rows - skipped, _ROWS),)](
            queue, queue if scales is None else scales, pointer, keys, queue.stride(0), keys.stride(0), num_rows, skipped,
            size, width, scales is not None, _ROWS, triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
