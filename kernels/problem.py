"""The argument lists of the operators, defined once: operators, kernels and portable paths take these values.

An operator's schema is derived from its class, field by field, and its implementation gets the fields as one value.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool", str: "str"}


class Problem(NamedTuple):
    """One call of the loss: Eq. 6, or Eq. 4 if ``k_b`` and ``lam`` are None.

    Args:
        q: queries [B, D]. k_a, k_b: their keys [B, D]. lam: weight of k_a, [B] or [1]. queue: [K, D].
        queue_scales: [K] fp32 for an fp8 queue, whose codes are in ``queue`` as uint8; otherwise None.
        temperature: tau.
        normalize: L2-normalize q and the keys.
        unit_queue: whether the caller states that no row of the queue is longer than 1 (up to rounding).
        precision: precision of the kernels' products: auto, ieee, tf32, bf16 or fp16; see :func:`tile_precision`.
        reduction: reduction of the loss: mean, sum or none.
        need_grad: whether to compute the gradient.
        impl: auto, triton or torch.
    """

    q: Tensor
    k_a: Tensor
    k_b: Tensor | None
    lam: Tensor | None
    queue: Tensor
    queue_scales: Tensor | None
    temperature: float
    normalize: bool
    unit_queue: bool
    precision: str
    reduction: str
    need_grad: bool
    impl: str


class LseProblem(NamedTuple):
    """One call of the primitive for ``z``; ``need_mu`` says whether to compute mu. The rest is as in Problem."""

    z: Tensor
    queue: Tensor
    queue_scales: Tensor | None
    temperature: float
    precision: str
    need_mu: bool
    impl: str


class BatchNorm(NamedTuple):
    """One call of BatchNorm over groups of the batch, in training.

    Args:
        x: [B, C, H, W]; B is a multiple of ``group``.
        weight: [C], or None for 1. bias: [C], or None for 0; give both or neither.
        residual: like x, added after the affine map.
        group: images per group. eps: added to the variance.
        relu: whether negative values become 0 in the end.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    group: int
    eps: float
    relu: bool


class BatchNormGradient(NamedTuple):
    """One call of the gradient of BatchNorm.

    Args:
        grad: gradient of the output, like x. x, weight, group, eps: as in BatchNorm.
        out: the output if ``relu`` was set, otherwise None.
        means, scales: statistics of the groups, [B / group, C]; scales are 1 / sqrt(variance + eps).
        residual: whether to return the residual's gradient.
    """

    grad: Tensor
    x: Tensor
    weight: Tensor | None
    out: Tensor | None
    means: Tensor
    scales: Tensor
    group: int
    eps: float
    residual: bool


def schema(arguments: type[Any]) -> str:
    """The argument list of the operator that takes these fields."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(arguments).items())


def tile_precision(precision: str, query: torch.dtype, queue: torch.dtype) -> str:
    """The precision of products of query and queue tiles: ieee or tf32 (both fp32), bf16 or fp16.

    "auto" is the half-precision dtype of the query or the queue, bf16 if both occur (its range covers any row), and ieee for
    fp32 with fp32. Codes of an fp8 queue (uint8) are exact in both; with an fp32 query, it is bf16.
    """
    if precision != "auto":
        return precision
    if torch.bfloat16 in (query, queue):
        return "bf16"
    if torch.float16 in (query, queue):
        return "fp16"
    return "bf16" if queue == torch.uint8 else "ieee"
