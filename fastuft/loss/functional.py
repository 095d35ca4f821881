"""The public losses: checks, choice of implementation, reduction."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from fastuft.loss import ops
from fastuft.values import visible

Reduction = Literal["mean", "sum", "none"]
Impl = Literal["auto", "triton", "torch"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _check_matrix(name: str, value: object, query: Tensor | None = None) -> None:
    """Raise ValueError unless value is a float matrix, of the query's width and on its device."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; it must be a tensor")
    if value.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be a matrix [rows, D]")
    if value.dtype not in _DTYPES:
        raise ValueError(
            f"{name} has dtype {value.dtype}; allowed: float32, float16, bfloat16 (float64 with impl='torch')"
        )
    if query is None:
        return
    if value.shape[1] != query.shape[1]:
        raise ValueError(f"{name} has width {value.shape[1]}; it must be the query's, {query.shape[1]}")
    if value.device != query.device:
        raise ValueError(f"{name} is on {value.device} and the query on {query.device}; move it there")
    if value.requires_grad:
        raise ValueError(f"{name} requires grad; keys and queue are constants of this loss: pass {name}.detach()")


def _check_query(name: str, query: Tensor) -> None:
    _check_matrix(name, query)
    if query.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(query.shape)}; it needs at least one row and one column")


def _check_temperature(temperature: float) -> float:
    if not isinstance(temperature, (int, float, Real)) or not (0 < temperature < math.inf):
        raise ValueError(f"temperature={temperature!r} is out of range; it must be a positive number")
    return float(temperature)


def _check_impl(impl: Impl) -> None:
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl={impl!r} is not allowed; choose one of 'auto', 'triton', 'torch'")


def _check_reduction(reduction: Reduction) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is not allowed; choose one of 'mean', 'sum', 'none'")


def _as_weight(lam: float | Tensor, q: Tensor) -> Tensor:
    """lam as a constant [1] or [B] tensor on the query's device."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if not isinstance(lam, Tensor):
        if not isinstance(lam, (int, float, Real)) or not 0 <= lam <= 1:
            raise ValueError(f"lam={lam!r} is out of range; it must be a number or a tensor [B] in [0, 1]")
        return torch.full((1,), float(lam), dtype=dtype, device=q.device)
    if lam.requires_grad:
        raise ValueError("lam requires grad; the mixing weight is a constant of this loss: pass lam.detach()")
    if not lam.is_floating_point() or lam.ndim > 1 or lam.numel() not in (1, q.shape[0]):
        raise ValueError(
            f"lam has shape {tuple(lam.shape)} and dtype {lam.dtype}; it must be a number or a float tensor [{q.shape[0]}]"
        )
    if lam.device != q.device:
        raise ValueError(f"lam is on {lam.device} and the query on {q.device}; move it there")
    lam = lam.reshape(-1).to(dtype)
    inside = (lam >= 0) & (lam <= 1)
    if visible(lam):
        if not inside.all():
            raise ValueError(
                f"lam has values outside [0, 1] (from {lam.min().item():g} to {lam.max().item():g}); allowed: [0, 1]"
            )
        return lam
    return torch.where(
        inside, lam, torch.nan
    )  # a look at the values would make the host wait: wrong ones poison the loss


def _reduce(loss: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _run(
    q: Tensor,
    keys: dict[str, Tensor],
    lam: float | Tensor | None,
    queue: Tensor,
    temperature: float,
    normalize: bool,
    impl: Impl,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(loss [B], a [B], b [B], lse [B], weight) of each sample, after all checks; keys are one or two, by argument name."""
    _check_query("q", q)
    for name, key in keys.items():
        _check_matrix(name, key, q)
        if key.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has {key.shape[0]} rows; it must have the query's, {q.shape[0]}")
    _check_matrix("queue", queue, q)
    _check_impl(impl)
    temperature = _check_temperature(temperature)
    weight = None if lam is None else _as_weight(lam, q)
    k_a, k_b = (*keys.values(), None)[:2]
    assert k_a is not None
    loss, _, a, b, lse = ops.mixed_info_nce(q, k_a, k_b, weight, queue, temperature, normalize, impl)
    return loss, a, b, lse, weight


def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float = 0.2,
    *,
    normalize: bool = True,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """InfoNCE against a queue of negatives (Eq. 4 of Li et al. 2021; MoCo), in one pass over the queue.

    Equals, without storing the [B, K + 1] logits::

        q, k = F.normalize(q), F.normalize(k)                      # normalize=True
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
        F.cross_entropy(logits, torch.zeros(B, dtype=torch.long))

    Args:
        q: queries [B, D], float32, float16 or bfloat16 (float64 with ``impl="torch"``); takes the gradient.
        k: their positive keys [B, D], a constant.
        queue: negatives [K, D], a constant, used as they are (unit rows in MoCo); K may be 0.
        temperature: tau.
        normalize: L2-normalize q and k first; the gradient passes through it. Rows of q shorter than 1e-12 get none.
        reduction: mean, sum or none ([B]).
        impl: triton (fused kernels), torch (any device), or auto: triton on CUDA where it applies.

    Returns:
        The loss in float32 (float64 for float64 inputs). Backward may run twice; double backward raises.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a key or queue that requires grad, an unknown option.
    """
    _check_reduction(reduction)
    loss, *_ = _run(q, {"k": k}, None, queue, temperature, normalize, impl)
    return _reduce(loss, reduction)


def mixed_info_nce(
    q: Tensor,
    k_a: Tensor,
    k_b: Tensor,
    lam: float | Tensor,
    queue: Tensor,
    temperature: float = 0.2,
    *,
    normalize: bool = True,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """InfoNCE of mixed queries with two weighted positives (Eq. 6 of Li et al. 2021), in one pass over the queue.

    Equals ``lam * info_nce(q, k_a, queue) + (1 - lam) * info_nce(q, k_b, queue)`` for each sample; both terms share one
    log-sum-exp, because they share the query.

    Args:
        q: mixed queries [B, D]; takes the gradient.
        k_a: keys of the first image of each mix [B, D], a constant.
        k_b: keys of the second [B, D], a constant.
        lam: share of the first, a number or [B], in [0, 1]. In a CUDA tensor, or compiled, other values give NaN.
        queue, temperature, normalize, reduction, impl: as for :func:`info_nce`.

    Returns, Raises: as for :func:`info_nce`.
    """
    _check_reduction(reduction)
    loss, *_ = _run(q, {"k_a": k_a, "k_b": k_b}, lam, queue, temperature, normalize, impl)
    return _reduce(loss, reduction)


def info_nce_with_terms(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.2, *, normalize: bool = True, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss, alignment, distribution): Eq. 1-3, loss = alignment + distribution.

    alignment = mean(-a), distribution = mean log(e^a + e^lse); both carry no gradient. Arguments as :func:`info_nce`.
    """
    loss, a, _, lse, _ = _run(q, {"k": k}, None, queue, temperature, normalize, impl)
    return loss.mean(), -a.mean(), torch.logaddexp(a, lse).mean()


def mixed_info_nce_with_terms(
    q: Tensor,
    k_a: Tensor,
    k_b: Tensor,
    lam: float | Tensor,
    queue: Tensor,
    temperature: float = 0.2,
    *,
    normalize: bool = True,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss, alignment, distribution) of Eq. 6; the terms weigh both positives as the loss does.

    Arguments as :func:`mixed_info_nce`.
    """
    loss, a, b, lse, weight = _run(q, {"k_a": k_a, "k_b": k_b}, lam, queue, temperature, normalize, impl)
    assert weight is not None
    alignment = -(weight * a + (1 - weight) * b).mean()
    distribution = weight * torch.logaddexp(a, lse) + (1 - weight) * torch.logaddexp(b, lse)
    return loss.mean(), alignment, distribution.mean()


def queue_lse(z: Tensor, queue: Tensor, temperature: float = 0.2, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """The primitive: log-sum-exp over the queue, and the queue's mean under that softmax, in one sweep.

    Equals ``logits = z @ queue.T / temperature; logits.logsumexp(1), logits.softmax(1) @ queue``.

    Args:
        z: [B, D], used as they are.
        queue: [K, D], a constant; for K = 0, lse is -inf and mu is 0.
        temperature: tau.
        impl: as for :func:`info_nce`.

    Returns:
        (lse [B], mu [B, D]) in float32 (float64 for float64 inputs). lse is differentiable in z (by mu / tau); mu is not.

    Raises:
        ValueError: as :func:`info_nce`.
    """
    _check_query("z", z)
    _check_matrix("queue", queue, z)
    _check_impl(impl)
    return ops.queue_lse(z, queue, _check_temperature(temperature), True, impl)
