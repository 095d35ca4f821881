"""The argument lists of the queue losses, each written once: operators, kernels and the portable path take these values.

An operator's schema is read off its class, field by field, and its implementation gets the fields back as one value.
"""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", bool: "bool", str: "str"}


class Problem(NamedTuple):
    """One call of the loss: Eq. 6, or Eq. 4 where ``k_b`` and ``lam`` are None.

    Args:
        q: queries [B, D]. k_a, k_b: their keys [B, D]. lam: weight of k_a, [B] or [1]. queue: [K, D].
        temperature: tau.
        normalize: L2-normalize q and the keys.
        unit_queue: the caller states that no row of the queue is longer than 1 (but for rounding).
        precision: what the kernels multiply in: auto, ieee, tf32, bf16 or fp16; see :func:`tile_precision`.
        reduction: mean, sum or none, of the loss.
        need_grad: else the gradient is not computed.
        impl: auto, triton or torch.
    """

    q: Tensor
    k_a: Tensor
    k_b: Tensor | None
    lam: Tensor | None
    queue: Tensor
    temperature: float
    normalize: bool
    unit_queue: bool
    precision: str
    reduction: str
    need_grad: bool
    impl: str


class LseProblem(NamedTuple):
    """One call of the primitive, for ``z`` as it is; ``need_mu``: else mu is not computed. The rest as in Problem."""

    z: Tensor
    queue: Tensor
    temperature: float
    precision: str
    need_mu: bool
    impl: str


def schema(arguments: type[Problem] | type[LseProblem]) -> str:
    """The argument list of the operator that takes these fields."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(arguments).items())


def tile_precision(precision: str, query: torch.dtype, queue: torch.dtype) -> str:
    """What tiles of query and queue are multiplied in: ieee or tf32 (both fp32), bf16 or fp16.

    "auto" takes the half-precision dtype of the query or the queue, bf16 where both occur (its range holds any row),
    and ieee for fp32 with fp32.
    """
    if precision != "auto":
        return precision
    if torch.bfloat16 in (query, queue):
        return "bf16"
    return "fp16" if torch.float16 in (query, queue) else "ieee"
