"""One registered operator per primitive: its implementation, shapes and gradient.

The losses are functional, compute their gradient in the forward pass, and have an autograd formula that only scales it, so
``torch.compile`` sees opaque calls. Gradients cannot be differentiated again: double backward raises an error.

In eager mode, the same formula runs in a ``torch.autograd.Function`` around the operator: the wrapper that
``register_autograd`` generates takes two to three times the host time (``custom_op`` takes four times, and a Function with
``setup_context`` as much as the wrapper), which matters beside a kernel of 20 us.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from fastuft import fused
from fastuft.kernels.problem import LseProblem, Problem, schema
from fastuft.loss import dispatch, portable

_library = torch.library.Library("fastuft", "FRAGMENT")
_library.define(f"queue_lse({schema(LseProblem)}) -> (Tensor, Tensor)")
_library.define(f"mixed_info_nce({schema(Problem)}) -> (Tensor, Tensor, Tensor)")
_library.define("scaled_gradient(Tensor gradient, Tensor upstream, float factor, ScalarType dtype) -> Tensor")
_library.define("enqueue_(Tensor(a!) queue, Tensor(b!)? scales, Tensor(c!) pointer, Tensor keys) -> ()")


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run an implementation as written, because an active autocast would lower the precision inside."""

    def run(*arguments: Any) -> Any:
        device = arguments[0].device.type
        if not torch.is_autocast_enabled(device):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


def reduce(values: Tensor, reduction: str) -> Tensor:
    """The mean or sum of values [B], or the values themselves for none."""
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()


@_without_autocast
def _queue_lse(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = LseProblem(*arguments)
    if dispatch.use_fused(problem.impl, problem.z, problem.queue):
        from fastuft.kernels import queue_sweep

        dispatch.warn_of_exact_products(problem.precision, problem.z, problem.queue)
        return queue_sweep.queue_lse(problem)
    compute = torch.float64 if torch.float64 in (problem.z.dtype, problem.queue.dtype) else torch.float32
    rows = portable.Queue(problem.queue, problem.queue_scales)
    return portable.queue_lse(problem.z.to(compute), rows, problem.temperature, problem.need_mu)


@_without_autocast
def _mixed_info_nce(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(*arguments)
    if dispatch.use_fused(problem.impl, problem.q, problem.queue, problem.k_a, problem.k_b):
        from fastuft.kernels import queue_sweep

        dispatch.warn_of_exact_products(problem.precision, problem.q, problem.queue)
        loss, gradient, alignment = queue_sweep.mixed_info_nce(problem)
    else:
        loss, gradient, alignment = portable.mixed_info_nce(problem)
    return reduce(loss, problem.reduction), gradient, alignment


def _scaled_gradient(gradient: Tensor, upstream: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """gradient [B, D] * factor * upstream ([B], or one value for all rows), computed before the cast to dtype."""
    usable = fused.triton_installed() and fused.refusal(fused.LOSS, fused.GRADIENT) is None
    if gradient.is_cuda and gradient.dtype == torch.float32 and usable:
        from fastuft.kernels import queue_combine

        return queue_combine.scaled_gradient(gradient, upstream, factor, dtype)
    return (gradient * (upstream.reshape(-1, 1) * factor)).to(dtype)


def _enqueue_(queue: Tensor, scales: Tensor | None, pointer: Tensor, keys: Tensor) -> None:
    usable = fused.triton_installed() and fused.refusal(fused.ENQUEUE) is None
    if keys.is_cuda and queue.dtype != torch.float64 and usable:
        from fastuft.kernels import enqueue

        enqueue.enqueue_(queue, scales, pointer, keys)
    else:
        portable.enqueue_(queue, scales, pointer, keys)


for _name, _implementation in (
    ("queue_lse", _queue_lse),
    ("mixed_info_nce", _mixed_info_nce),
    ("scaled_gradient", _scaled_gradient),
    ("enqueue_", _enqueue_),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@library.register_fake("fastuft::queue_lse", lib=_library)
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = LseProblem(*arguments)
    z, dtype = problem.z, _result_dtype(problem.z, problem.queue)
    width = z.shape[1] if problem.need_mu else 0
    return z.new_empty(z.shape[0], dtype=dtype), z.new_empty((z.shape[0], width), dtype=dtype)


@library.register_fake("fastuft::mixed_info_nce", lib=_library)
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(*arguments)
    q, dtype = problem.q, _result_dtype(problem.q, problem.k_a, problem.queue)
    width = q.shape[1] if problem.need_grad else 0
    rows = q.new_empty(q.shape[0], dtype=dtype)
    gradient = q.new_empty((q.shape[0], width), dtype=dtype)
    return reduce(rows, problem.reduction), gradient, torch.empty_like(rows)


@library.register_fake("fastuft::scaled_gradient", lib=_library)
def _(gradient: Tensor, upstream: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


@library.register_fake("fastuft::enqueue_", lib=_library)
def _(queue: Tensor, scales: Tensor | None, pointer: Tensor, keys: Tensor) -> None:
    return None


_queue_lse_op: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fastuft.queue_lse.default
_mixed_info_nce_op: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.fastuft.mixed_info_nce.default
_scaled_gradient_op = torch.ops.fastuft.scaled_gradient.default
enqueue_ = torch.ops.fastuft.enqueue_.default


class _NoSecondDerivative(torch.autograd.Function):
    """Identity whose backward raises an error, because the returned gradient must not silently act as a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, query: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the queue losses are differentiable only once, because their gradient is computed in the forward pass. "
            "Use fastuft.loss.reference for second derivatives."
        )


_once_differentiable: Callable[[Tensor, Tensor], Tensor] = _NoSecondDerivative.apply  # which has no annotations


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], factor: float) -> None:
    """Save the second output, which times ``factor`` is the gradient of the first output in the first input."""
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)  # outputs without a gradient need no zeros
    ctx.save_for_backward(outputs[1])
    # The query is an attribute, because its values are no longer needed and may change.
    ctx.query, ctx.factor, ctx.others = inputs[0], factor, (None,) * (len(inputs) - 1)


def _save_mu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output, 1 / LseProblem(*inputs).temperature)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    problem = Problem(*inputs)
    _save(ctx, inputs, output, 1 / problem.q.shape[0] if problem.reduction == "mean" else 1.0)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """Multiply the gradient by upstream and factor (1/B, 1/tau) in fp32; the cast to the query's dtype comes last."""
    if upstream is None:
        return None, *ctx.others
    (saved,) = ctx.saved_tensors
    gradient = _scaled_gradient_op(saved, upstream.detach(), ctx.factor, ctx.query.dtype)
    # With ``create_graph=True``, the gradient refuses to be differentiated in the query.
    return _once_differentiable(gradient, ctx.query) if torch.is_grad_enabled() else gradient, *ctx.others


library.register_autograd("fastuft::queue_lse", _backward, setup_context=_save_mu, lib=_library)
library.register_autograd("fastuft::mixed_info_nce", _backward, setup_context=_save_gradient, lib=_library)


class _QueueLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _queue_lse_op(*arguments)
        _save_mu(ctx, arguments, outputs)
        return outputs

    backward = staticmethod(_backward)


class _MixedInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _mixed_info_nce_op(*arguments)
        _save_gradient(ctx, arguments, outputs)
        return outputs

    backward = staticmethod(_backward)


_queue_lse_with_gradient: Callable[..., tuple[Tensor, Tensor]] = _QueueLse.apply
_mixed_info_nce_with_gradient: Callable[..., tuple[Tensor, Tensor, Tensor]] = _MixedInfoNCE.apply


def _refuse_transforms(query: Tensor) -> None:
    """Refuse function transforms: the gradient comes from the forward pass, which they would differentiate instead."""
    if torch.compiler.is_compiling():
        return
    forward_mode = forward_ad._current_level >= 0 and forward_ad.unpack_dual(query).tangent is not None
    if forward_mode or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the queue losses work with backward() and torch.autograd.grad, not with torch.func's transforms (grad, vjp, jvp, "
            "jacrev, jacfwd, vmap) and forward-mode differentiation. Use fastuft.loss.reference for those."
        )


def queue_lse(problem: LseProblem) -> tuple[Tensor, Tensor]:
    """(lse [B], mu [B, D], or [B, 0] if it is not needed); lse is differentiable in z if mu is computed."""
    _refuse_transforms(problem.z)
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and problem.z.requires_grad):
        return _queue_lse_op(*problem)
    return _queue_lse_with_gradient(*problem)


def mixed_info_nce(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(reduced loss; its gradient [B, D] before the reduction, or [B, 0] if not needed; alignment of each sample [B]).

    alignment = -(lam a + (1 - lam) b); only the loss is differentiable, in q.
    """
    _refuse_transforms(problem.q)
    if torch.compiler.is_compiling() or not problem.need_grad:
        return _mixed_info_nce_op(*problem)
    return _mixed_info_nce_with_gradient(*problem)
