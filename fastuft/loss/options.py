"""The options of a loss, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

Reduction = Literal["mean", "sum", "none"]
Impl = Literal["auto", "triton", "torch"]
Precision = Literal["auto", "ieee", "tf32", "bf16"]


@dataclass(frozen=True)
class LossOptions:
    """Options of the losses.

    Args:
        temperature: tau, a positive number.
        normalize: L2-normalize queries and keys first; the gradient includes the normalization. Query rows shorter than
            1e-12 get no gradient.
        reduction: mean, sum or none ([B]).
        impl: triton (fused kernels), torch (any device), or auto (triton on CUDA if it applies).
        precision: precision of the products in the fused kernels, which always accumulate in fp32. auto: autocast's dtype
            under autocast, otherwise the half-precision dtype of query or queue, otherwise ieee (exact fp32, without tensor
            cores). tf32 and bf16 round queries and queue to that format. An fp8 queue is multiplied in half precision, in
            bf16 with an fp32 query. The portable path multiplies in fp32.
        unit_queue: states that no row of the queue is longer than 1, so the fused kernels need no running maximum. A false
            statement gives infinite or inexact losses. Passing a :class:`fastuft.KeyQueue` instead of its keys implies it.

    Raises:
        ValueError: a value that is not allowed.
    """

    temperature: float = 0.2
    normalize: bool = True
    reduction: Reduction = "mean"
    impl: Impl = "auto"
    precision: Precision = "auto"
    unit_queue: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, (int, float, Real)) or not (0 < self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature!r} is out of range; it must be a positive number")
        object.__setattr__(self, "temperature", float(self.temperature))
        for name, kind in (("reduction", Reduction), ("impl", Impl), ("precision", Precision)):
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not allowed; choose one of {', '.join(map(repr, allowed))}")
