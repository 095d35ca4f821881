"""The public losses: they check the tensors and call the operator."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from fastuft.kernels.problem import LseProblem, Problem
from fastuft.loss import ops
from fastuft.loss.options import Impl, LossOptions, Precision, Reduction
from fastuft.loss.queue import KeyQueue
from fastuft.values import visible

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_AUTOCAST = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_CODES = (torch.uint8, torch.float8_e4m3fn)
_DEFAULTS = LossOptions()


def _check_matrix(name: str, value: object, query: Tensor | None = None) -> None:
    """Raise ValueError unless value is a float matrix with the query's width and device."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; it must be a tensor")
    if value.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be a matrix [rows, D]")
    if value.dtype not in _DTYPES:
        raise ValueError(
            f"{name} has dtype {value.dtype}; allowed: float32, float16, bfloat16 (float64 with impl='torch')"
        )
    if query is not None:
        _check_fits(name, value, query)


def _check_fits(name: str, value: Tensor, query: Tensor) -> None:
    if value.shape[1] != query.shape[1]:
        raise ValueError(f"{name} has width {value.shape[1]}; it must be the query's, {query.shape[1]}")
    if value.device != query.device:
        raise ValueError(f"{name} is on {value.device} but the query is on {query.device}; move it there")
    if value.requires_grad:
        raise ValueError(f"{name} requires grad; keys and queue are constants of this loss: pass {name}.detach()")


def _negatives(queue: Tensor | KeyQueue, query: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """(rows [K, D], their scales [K] or None, whether they are known to be unit rows), checked."""
    if isinstance(queue, KeyQueue):
        _check_fits("queue", queue.keys, query)
        return queue.keys, queue.scales, True
    if isinstance(queue, Tensor) and queue.dtype in _CODES:
        raise ValueError(
            f"queue has dtype {queue.dtype}, whose rows are meaningless without their scales; pass the KeyQueue itself, "
            "not its keys"
        )
    _check_matrix("queue", queue, query)
    return queue, None, False


def _check_query(name: str, query: Tensor) -> None:
    _check_matrix(name, query)
    if query.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(query.shape)}; it needs at least one row and one column")


def _as_weight(lam: float | Tensor, q: Tensor) -> Tensor:
    """lam as a constant [1] or [B] tensor on the query's device."""
    if not isinstance(lam, Tensor):
        if not isinstance(lam, (int, float, Real)) or not 0 <= lam <= 1:
            raise ValueError(f"lam={lam!r} is out of range; it must be a number or a tensor [B] in [0, 1]")
        return torch.full((1,), float(lam), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if lam.requires_grad:
        raise ValueError("lam requires grad; the mixing weight is a constant of this loss: pass lam.detach()")
    if not lam.is_floating_point() or lam.ndim > 1 or lam.numel() not in (1, q.shape[0]):
        raise ValueError(
            f"lam has shape {tuple(lam.shape)} and dtype {lam.dtype}; it must be a number or a float tensor [{q.shape[0]}]"
        )
    if lam.device != q.device:
        raise ValueError(f"lam is on {lam.device} but the query is on {q.device}; move it there")
    # On a GPU, checking the values would make the host wait; there, the operator returns NaN for wrong ones.
    if visible(lam) and not ((lam >= 0) & (lam <= 1)).all():
        raise ValueError(
            f"lam has values outside [0, 1] (from {lam.min().item():g} to {lam.max().item():g}); allowed: [0, 1]"
        )
    return lam.reshape(-1)


def _precision(options: LossOptions, q: Tensor) -> str:
    """The operator's precision, including autocast: an operator must not depend on its caller's context."""
    if options.precision == "auto" and torch.is_autocast_enabled(q.device.type):
        return _AUTOCAST.get(torch.get_autocast_dtype(q.device.type), "auto")
    return options.precision


def _check_fp8(scales: Tensor | None, options: LossOptions) -> None:
    if scales is not None and options.precision in ("ieee", "tf32"):
        raise ValueError(
            f"precision={options.precision!r} is not allowed with an fp8 queue, whose rows have 4 significant bits: the "
            "kernels multiply them in half precision; use 'auto' or 'bf16'"
        )


def _run(
    q: Tensor, keys: dict[str, Tensor], lam: float | Tensor | None, queue: Tensor | KeyQueue, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """(loss, alignment of each sample [B]), after all checks; ``keys`` has one or two, by argument name."""
    _check_query("q", q)
    for name, key in keys.items():
        _check_matrix(name, key, q)
        if key.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has {key.shape[0]} rows; it must have the query's, {q.shape[0]}")
    rows, scales, unit = _negatives(queue, q)
    _check_fp8(scales, options)
    k_a, k_b = (*keys.values(), None)[:2]
    assert k_a is not None
    problem = Problem(
        q,
        k_a,
        k_b,
        None if lam is None else _as_weight(lam, q),
        rows,
        scales,
        options.temperature,
        options.normalize,
        options.unit_queue or unit,
        _precision(options, q),
        options.reduction,
        torch.is_grad_enabled() and q.requires_grad,
        options.impl,
    )
    loss, _, alignment = ops.mixed_info_nce(problem)
    return loss, alignment


def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor | KeyQueue,
    temperature: float = 0.2,
    *,
    normalize: bool = True,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    precision: Precision = "auto",
    unit_queue: bool = False,
) -> Tensor:
    """InfoNCE against a queue of negatives (Eq. 4 of Li et al. 2021; MoCo), in one pass over the queue.

    Equals, without storing the [B, K + 1] logits::

        q, k = F.normalize(q), F.normalize(k)                      # normalize=True
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
        F.cross_entropy(logits, torch.zeros(B, dtype=torch.long))

    Args:
        q: queries [B, D], float32, float16 or bfloat16 (float64 with ``impl="torch"``); the only input with a gradient.
        k: their positive keys [B, D], a constant.
        queue: negatives [K, D], a constant, not normalized (unit rows in MoCo); K may be 0. A :class:`fastuft.KeyQueue`
            stands for its keys and states that they are unit rows.
        temperature, normalize, reduction, impl, precision, unit_queue: see :class:`fastuft.loss.LossOptions`.

    Returns:
        The loss in float32 (float64 for float64 inputs). Backward may run twice; double backward raises an error.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a key or the queue requires grad, or an option is unknown.
    """
    options = LossOptions(temperature, normalize, reduction, impl, precision, unit_queue)
    return _run(q, {"k": k}, None, queue, options)[0]


def mixed_info_nce(
    q: Tensor,
    k_a: Tensor,
    k_b: Tensor,
    lam: float | Tensor,
    queue: Tensor | KeyQueue,
    temperature: float = 0.2,
    *,
    normalize: bool = True,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    precision: Precision = "auto",
    unit_queue: bool = False,
) -> Tensor:
    """InfoNCE for mixed queries with two weighted positives (Eq. 6 of Li et al. 2021), in one pass over the queue.

    Equals ``lam * info_nce(q, k_a, queue) + (1 - lam) * info_nce(q, k_b, queue)`` for each sample. Both terms share one
    log-sum-exp, because they have the same query.

    Args:
        q: mixed queries [B, D]; the only input with a gradient.
        k_a: keys of the first image of each mix [B, D], a constant.
        k_b: keys of the second image [B, D], a constant.
        lam: share of the first image, a number or [B], in [0, 1]. In a CUDA tensor or compiled code, other values give NaN.
        queue: as for :func:`info_nce`.
        temperature, normalize, reduction, impl, precision, unit_queue: see :class:`fastuft.loss.LossOptions`.

    Returns, Raises: as for :func:`info_nce`.
    """
    options = LossOptions(temperature, normalize, reduction, impl, precision, unit_queue)
    return _run(q, {"k_a": k_a, "k_b": k_b}, lam, queue, options)[0]


def info_nce_with_terms(
    q: Tensor, k: Tensor, queue: Tensor | KeyQueue, options: LossOptions = _DEFAULTS
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, alignment, distribution) of Eq. 1-3, with the same reduction; loss = alignment + distribution.

    alignment = -a, distribution = log(e^a + e^lse); neither has a gradient. Tensors as for :func:`info_nce`.
    """
    return _with_terms(*_run(q, {"k": k}, None, queue, options), options.reduction)


def mixed_info_nce_with_terms(
    q: Tensor,
    k_a: Tensor,
    k_b: Tensor,
    lam: float | Tensor,
    queue: Tensor | KeyQueue,
    options: LossOptions = _DEFAULTS,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, alignment, distribution) of Eq. 6; the terms weight both positives as the loss does.

    Tensors as for :func:`mixed_info_nce`.
    """
    return _with_terms(*_run(q, {"k_a": k_a, "k_b": k_b}, lam, queue, options), options.reduction)


def _with_terms(loss: Tensor, alignment: Tensor, reduction: Reduction) -> tuple[Tensor, Tensor, Tensor]:
    alignment = ops.reduce(alignment, reduction)
    return loss, alignment, loss.detach() - alignment


def queue_lse(
    z: Tensor,
    queue: Tensor | KeyQueue,
    temperature: float = 0.2,
    *,
    impl: Impl = "auto",
    precision: Precision = "auto",
) -> tuple[Tensor, Tensor]:
    """The primitive: the log-sum-exp over the queue, and the queue's mean under that softmax, in one sweep.

    Equals ``logits = z @ queue.T / temperature; logits.logsumexp(1), logits.softmax(1) @ queue``.

    Args:
        z: [B, D], not normalized.
        queue: [K, D], a constant, or a :class:`fastuft.KeyQueue`; for K = 0, lse is -inf and mu is 0.
        temperature, impl, precision: see :class:`fastuft.loss.LossOptions`.

    Returns:
        (lse [B], mu [B, D]) in float32 (float64 for float64 inputs). lse is differentiable in z (its gradient is mu / tau);
        mu is not.

    Raises:
        ValueError: as for :func:`info_nce`.
    """
    options = LossOptions(temperature, impl=impl, precision=precision)
    _check_query("z", z)
    rows, scales, _ = _negatives(queue, z)
    _check_fp8(scales, options)
    return ops.queue_lse(LseProblem(z, rows, scales, options.temperature, _precision(options, z), True, impl))
