"""BatchNorm over groups of the batch as one registered operator per direction.

Fused kernels (``fastuft.kernels.grouped_batchnorm``, where the formulas stand) serve channels_last on CUDA; elsewhere the
backend's own BatchNorm runs for each group. Called eagerly, autograd enters by a ``torch.autograd.Function``: the wrapping
that ``register_autograd`` generates costs a multiple of its host time, and a ResNet-50 step has 159 of these calls.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor, library

from fastuft import fused

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # output, means, variances, scales
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of x, weight, bias and residual; empty where there is none

library.define(
    "fastuft::grouped_batch_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int group, float eps, bool relu) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
library.define(
    "fastuft::grouped_batch_norm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor? out, Tensor means, Tensor scales, "
    "int group, float eps, bool residual) -> (Tensor, Tensor, Tensor, Tensor)",
)


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _use_fused(x: Tensor) -> bool:
    if not x.is_cuda or not _triton_installed() or fused.refusal(fused.BATCHNORM) is not None:
        return False
    from fastuft.kernels import grouped_batchnorm

    return grouped_batchnorm.unsupported(x) is None


def portable_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, group: int, eps: float, relu: bool
) -> Outputs:
    """The operator by the backend's own BatchNorm of each group."""
    compute = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if value is None else value.to(compute) for value in (weight, bias))
    parts = x.split(group)
    means = x.new_empty((len(parts), x.shape[1]), dtype=compute)
    variances, scales = torch.zeros_like(means), torch.empty_like(means)
    normalized = []
    for index, part in enumerate(parts):
        # With momentum 1 the "running" statistics are this group's.
        ignored = torch.zeros_like(means[index])
        part, means[index], scales[index] = torch.native_batch_norm(
            part, weight, bias, ignored, variances[index], True, 1.0, eps
        )
        normalized.append(part)
    out = torch.cat(normalized, out=torch.empty_like(x))
    if residual is not None:
        out += residual
    return (out.relu_() if relu else out), means, variances, scales


def portable_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    out: Tensor | None,
    means: Tensor,
    scales: Tensor,
    group: int,
    eps: float,
    residual: bool,
) -> Gradients:
    """The gradient of the operator by the backend's own, group by group."""
    if out is not None:
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    weight = None if weight is None else weight.to(means.dtype)
    affine = weight is not None
    found = [
        torch.ops.aten.native_batch_norm_backward(
            d, part, weight, None, None, mean, scale, True, eps, [True, affine, affine]
        )
        for d, part, mean, scale in zip(grad.split(group), x.split(group), means, scales, strict=True)
    ]
    grad_x = torch.cat([part for part, _, _ in found], out=torch.empty_like(x))
    if affine:
        # From the last group to the first: the order in which autograd adds up the gradients of one operator per group.
        grad_weight = reduce(torch.add, [part for _, part, _ in reversed(found)])
        grad_bias = reduce(torch.add, [part for _, _, part in reversed(found)])
    else:
        grad_weight, grad_bias = x.new_empty(0), x.new_empty(0)
    return grad_x, grad_weight, grad_bias, grad if residual else x.new_empty(0)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, group: int, eps: float, relu: bool
) -> Outputs:
    if _use_fused(x):
        from fastuft.kernels import grouped_batchnorm

        return grouped_batchnorm.forward(x, weight, bias, residual, group, eps, relu)
    return portable_forward(x, weight, bias, residual, group, eps, relu)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    out: Tensor | None,
    means: Tensor,
    scales: Tensor,
    group: int,
    eps: float,
    residual: bool,
) -> Gradients:
    if _use_fused(x):
        from fastuft.kernels import grouped_batchnorm

        return grouped_batchnorm.backward(grad, x, weight, out, means, scales, group, residual)
    return portable_backward(grad, x, weight, out, means, scales, group, eps, residual)


library.impl("fastuft::grouped_batch_norm", "default", _forward)
library.impl("fastuft::grouped_batch_norm_backward", "default", _backward)


@library.register_fake("fastuft::grouped_batch_norm")
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, group: int, eps: float, relu: bool
) -> Outputs:
    statistics = (x.shape[0] // group, x.shape[1])
    means, variances, scales = (
        x.new_empty(statistics, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(3)
    )
    return torch.empty_like(x), means, variances, scales


@library.register_fake("fastuft::grouped_batch_norm_backward")
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    out: Tensor | None,
    means: Tensor,
    scales: Tensor,
    group: int,
    eps: float,
    residual: bool,
) -> Gradients:
    grad_weight, grad_bias = (means.new_empty(x.shape[1] if weight is not None else 0) for _ in range(2))
    return torch.empty_like(x), grad_weight, grad_bias, torch.empty_like(x) if residual else x.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, weight, _, residual, ctx.group, ctx.eps, relu = inputs
    out, means, variances, scales = output
    ctx.mark_non_differentiable(means, variances, scales)
    ctx.set_materialize_grads(False)
    ctx.residual = residual is not None
    ctx.save_for_backward(x, weight, out if relu else None, means, scales)


def _gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    if torch.is_grad_enabled():
        raise RuntimeError(
            "BatchNorm over groups is differentiable once; leave create_graph out, or use set_batchnorm_mode(..., 'plain')"
        )
    x, weight, *_saved = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_residual = _backward_op(
        grad, x, weight, *_saved, ctx.group, ctx.eps, ctx.residual
    )
    if weight is None:
        grad_weight = grad_bias = None
    else:
        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
    return grad_x, grad_weight, grad_bias, grad_residual if ctx.residual else None, None, None, None


library.register_autograd("fastuft::grouped_batch_norm", _gradients, setup_context=_save)

_forward_op = torch.ops.fastuft.grouped_batch_norm.default
_backward_op = torch.ops.fastuft.grouped_batch_norm_backward.default


class _GroupedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Outputs:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: Outputs = _forward_op(*arguments)
        _save(ctx, arguments, outputs)
        return outputs

    backward = staticmethod(_gradients)


def grouped_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    group: int,
    eps: float,
    relu: bool,
) -> Outputs:
    """BatchNorm of x [B, C, H, W] with statistics of each ``group`` consecutive images; then + residual, then ReLU.

    Args:
        x: float activations [B, C, H, W]; B is a multiple of ``group``.
        weight: [C], or None for 1.
        bias: [C], or None for 0; both or neither.
        residual: [B, C, H, W] like x; asks for ``relu`` too.
        group: images per group.
        eps: added to the variance.
        relu: whether negative values become 0.

    Returns:
        (output like x; means, unbiased variances and 1 / sqrt(variance + eps) of the groups, each [B / group, C], constants).
    """
    arguments = (x, weight, bias, residual, group, eps, relu)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, residual))
    eager = wanted and not torch.compiler.is_compiling()
    run: Callable[..., Outputs] = _GroupedBatchNorm.apply if eager else _forward_op
    return run(*arguments)
