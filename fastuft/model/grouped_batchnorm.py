"""BatchNorm over groups of the batch as one registered operator per direction.

Fused kernels (``fastuft.kernels.grouped_batchnorm``, which has the formulas) handle channels_last on CUDA; otherwise the
backend's own BatchNorm runs for each group. In eager mode, autograd uses a ``torch.autograd.Function``: the wrapper that
``register_autograd`` generates takes several times as much host time, and a ResNet-50 step has 159 of these calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, library

from fastuft import fused
from fastuft.kernels.problem import BatchNorm, BatchNormGradient, schema

__all__ = ["BatchNorm", "grouped_batch_norm", "portable_backward", "portable_forward"]

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # output, means, variances, scales
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of x, weight, bias and residual; empty if there is none

library.define("fastuft::grouped_batch_norm", f"({schema(BatchNorm)}) -> (Tensor, Tensor, Tensor, Tensor)")
library.define(
    "fastuft::grouped_batch_norm_backward", f"({schema(BatchNormGradient)}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _use_fused(x: Tensor) -> bool:
    if not x.is_cuda or not fused.triton_installed() or fused.refusal(fused.BATCHNORM) is not None:
        return False
    from fastuft.kernels import grouped_batchnorm

    return grouped_batchnorm.unsupported(x) is None


def portable_forward(problem: BatchNorm) -> Outputs:
    """The operator by the backend's own BatchNorm of each group."""
    x, weight, bias, residual, group, eps, relu = problem
    compute = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if value is None else value.to(compute) for value in (weight, bias))
    parts = x.split(group)
    means = x.new_empty((len(parts), x.shape[1]), dtype=compute)
    variances, scales = torch.zeros_like(means), torch.empty_like(means)
    normalized = []
    for index, part in enumerate(parts):
        # With momentum 1, the "running" statistics are those of this group.
        ignored = torch.zeros_like(means[index])
        part, means[index], scales[index] = torch.native_batch_norm(
            part, weight, bias, ignored, variances[index], True, 1.0, eps
        )
        normalized.append(part)
    out = torch.cat(normalized, out=torch.empty_like(x))
    if residual is not None:
        out += residual
    return (out.relu_() if relu else out), means, variances, scales


def portable_backward(problem: BatchNormGradient) -> Gradients:
    """The gradient of the operator by the backend's own, group by group."""
    grad, x, weight, out, means, scales, group, eps, residual = problem
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
        # From the last group to the first, the order in which autograd would add the gradients of one operator per group.
        grad_weight = reduce(torch.add, [part for _, part, _ in reversed(found)])
        grad_bias = reduce(torch.add, [part for _, _, part in reversed(found)])
    else:
        grad_weight, grad_bias = x.new_empty(0), x.new_empty(0)
    return grad_x, grad_weight, grad_bias, grad if residual else x.new_empty(0)


def _forward(*arguments: Any) -> Outputs:
    problem = BatchNorm(*arguments)
    if _use_fused(problem.x):
        from fastuft.kernels import grouped_batchnorm

        return grouped_batchnorm.forward(problem)
    return portable_forward(problem)


def _backward(*arguments: Any) -> Gradients:
    problem = BatchNormGradient(*arguments)
    if _use_fused(problem.x):
        from fastuft.kernels import grouped_batchnorm_gradient

        return grouped_batchnorm_gradient.backward(problem)
    return portable_backward(problem)


library.impl("fastuft::grouped_batch_norm", "default", _forward)
library.impl("fastuft::grouped_batch_norm_backward", "default", _backward)


@library.register_fake("fastuft::grouped_batch_norm")
def _(*arguments: Any) -> Outputs:
    x, group = BatchNorm(*arguments).x, BatchNorm(*arguments).group
    statistics = (x.shape[0] // group, x.shape[1])
    means, variances, scales = (
        x.new_empty(statistics, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(3)
    )
    return torch.empty_like(x), means, variances, scales


@library.register_fake("fastuft::grouped_batch_norm_backward")
def _(*arguments: Any) -> Gradients:
    problem = BatchNormGradient(*arguments)
    x, channels = problem.x, problem.x.shape[1] if problem.weight is not None else 0
    grad_weight, grad_bias = (problem.means.new_empty(channels) for _ in range(2))
    return torch.empty_like(x), grad_weight, grad_bias, torch.empty_like(x) if problem.residual else x.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    problem = BatchNorm(*inputs)
    out, means, variances, scales = output
    ctx.mark_non_differentiable(means, variances, scales)
    ctx.set_materialize_grads(False)
    ctx.group, ctx.eps, ctx.residual = problem.group, problem.eps, problem.residual is not None
    ctx.save_for_backward(problem.x, problem.weight, out if problem.relu else None, means, scales)


def _gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(BatchNorm._fields)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "BatchNorm over groups is differentiable only once; omit create_graph, or use set_batchnorm_mode(..., 'plain')"
        )
    x, weight, out, means, scales = ctx.saved_tensors
    arguments = BatchNormGradient(grad, x, weight, out, means, scales, ctx.group, ctx.eps, ctx.residual)
    grad_x, grad_weight, grad_bias, grad_residual = _backward_op(*arguments)
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
    def forward(ctx: Any, *arguments: object) -> Outputs:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: Outputs = _forward_op(*arguments)
        _save(ctx, arguments, outputs)
        return outputs

    backward = staticmethod(_gradients)


def grouped_batch_norm(problem: BatchNorm) -> Outputs:
    """BatchNorm of x [B, C, H, W] with statistics of each ``group`` consecutive images; then + residual, then ReLU.

    Returns:
        (output like x; means, unbiased variances and 1 / sqrt(variance + eps) of the groups, each [B / group, C], without
        gradient).
    """
    leaves = (problem.x, problem.weight, problem.residual)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    eager = wanted and not torch.compiler.is_compiling()
    run: Callable[..., Outputs] = _GroupedBatchNorm.apply if eager else _forward_op
    return run(*problem)
