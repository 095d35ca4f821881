"""8-bit floating point (e4m3: 1 sign, 4 exponent and 3 mantissa bits) in registers, bit by bit on chips without it.

The encoding of Micikevicius et al. 2022, "FP8 Formats for Deep Learning", without infinities. A row of a queue is codes
times a scale of its own; NaN is carried by the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT_SCALE = tl.constexpr(256.0)  # elements of unit rows times this stay below the largest code's value, 448


@triton.jit
def encode(value):
    """Codes (int32) of fp32 values within +-448, rounded to nearest even."""
    magnitude = tl.abs(value)
    bits = magnitude.to(tl.int32, bitcast=True)
    # Below 2^-6 codes are 2^-9 apart, as fp32 values at 2^14 are: adding 2^14 (bits 141 << 23) rounds.
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    large = (bits + ((bits >> 20) & 1) + 0x7FFFF - (120 << 23)) >> 20
    code = tl.where(bits < (121 << 23), small, large) & 0x7F
    return code | ((value.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def decode(codes, NATIVE: tl.constexpr):
    """fp32 values of codes (uint8); ``NATIVE`` says whether the chip converts them."""
    if NATIVE:
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        # Put sign, exponent and mantissa into the bits of an fp32, whose exponent is then 120 too small, also for subnormals.
        bits = (codes.to(tl.int32) << 24) >> 4
        value = (bits & -0x78000001).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return value


@triton.jit
def decode_rows(codes, scales_ptr, start, limit, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [start, start + BLOCK) of a queue with ``limit`` rows as fp32, from their codes [BLOCK, D]."""
    rows = start + tl.arange(0, BLOCK)
    return decode(codes, NATIVE) * tl.load(scales_ptr + rows, rows < limit, 0.0)[:, None]
