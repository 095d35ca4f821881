"""One torch.library operator a primitive, dispatching to the fused kernels or to the portable path.

Each is functional, computes its gradient in the forward pass and has an autograd formula that only scales it, so
``torch.compile`` sees one opaque call. Gradients cannot be differentiated again: double backward raises.

Called eagerly, the same formula runs from a ``torch.autograd.Function`` around the operator: the wrapping that
``register_autograd`` generates costs two to three times the host time (``custom_op`` four times; a Function with
``setup_context`` as much as the wrapping), which shows beside a kernel of 20 us.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastuft.loss import portable

_library = torch.library.Library("fastuft", "FRAGMENT")
_library.define("queue_lse(Tensor z, Tensor queue, float temperature, bool need_mu, str impl) -> (Tensor, Tensor)")
_library.define(
    "mixed_info_nce(Tensor q, Tensor k_a, Tensor? k_b, Tensor? lam, Tensor queue, float temperature, bool normalize, "
    "bool need_grad, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_reasons: dict[tuple[object, ...], str | None] = {}


@functools.cache
def triton_installed() -> bool:
    """Whether the fused kernels can be imported at all."""
    return importlib.util.find_spec("triton") is not None


def _fused_reason(q: Tensor, queue: Tensor) -> str | None:
    """Why the fused kernels cannot take tensors of this kind; None where they can. Asked once for each kind."""
    kind = (q.device, q.dtype, queue.dtype, q.shape[1])
    if kind not in _reasons:
        if triton_installed():
            from fastuft.kernels import queue_sweep

            _reasons[kind] = queue_sweep.unsupported(q, queue)
        else:
            _reasons[kind] = "Triton is not installed (pip install triton)"
    return _reasons[kind]


def _use_fused(impl: str, q: Tensor, queue: Tensor, *keys: Tensor | None) -> bool:
    """Whether the kernels run; with impl='auto' on CUDA alone.

    Raises:
        ValueError: impl='triton' where they cannot.
    """
    if impl == "torch" or (impl == "auto" and not q.is_cuda):
        return False
    reason = _fused_reason(q, queue)
    if reason is None and any(key is not None and key.dtype == torch.float64 for key in keys):
        reason = "a key is float64"
    if reason is not None and impl == "triton":
        raise ValueError(f"impl='triton' cannot run: {reason}; use impl='torch' or 'auto'")
    return reason is None


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run an implementation as written: an active autocast would lower the precision inside."""

    def run(*arguments: Any) -> Any:
        device = arguments[0].device.type
        if not torch.is_autocast_enabled(device):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


@_without_autocast
def _queue_lse(z: Tensor, queue: Tensor, temperature: float, need_mu: bool, impl: str) -> tuple[Tensor, Tensor]:
    if _use_fused(impl, z, queue):
        from fastuft.kernels import queue_sweep

        return queue_sweep.queue_lse_forward(z, queue, temperature, need_mu)
    compute = torch.float64 if torch.float64 in (z.dtype, queue.dtype) else torch.float32
    return portable.queue_lse(z.to(compute), queue, temperature, need_mu)


@_without_autocast
def _mixed_info_nce(
    q: Tensor,
    k_a: Tensor,
    k_b: Tensor | None,
    lam: Tensor | None,
    queue: Tensor,
    temperature: float,
    normalize: bool,
    need_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _use_fused(impl, q, queue, k_a, k_b):
        from fastuft.kernels import queue_sweep

        return queue_sweep.mixed_info_nce_forward(q, k_a, k_b, lam, queue, temperature, normalize, need_grad)
    loss, grad, a, b, lse = portable.mixed_info_nce(q, k_a, k_b, lam, queue, temperature, normalize, need_grad)
    return loss, grad, a, b.clone() if b is a else b, lse  # outputs of an operator may not alias each other


_library.impl("queue_lse", _queue_lse, "CompositeExplicitAutograd")
_library.impl("mixed_info_nce", _mixed_info_nce, "CompositeExplicitAutograd")


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@torch.library.register_fake("fastuft::queue_lse", lib=_library)
def _(z: Tensor, queue: Tensor, temperature: float, need_mu: bool, impl: str) -> tuple[Tensor, Tensor]:
    dtype = _result_dtype(z, queue)
    width = z.shape[1] if need_mu else 0
    return z.new_empty(z.shape[0], dtype=dtype), z.new_empty((z.shape[0], width), dtype=dtype)


@torch.library.register_fake("fastuft::mixed_info_nce", lib=_library)
def _(
    q: Tensor,
    k_a: Tensor,
    k_b: Tensor | None,
    lam: Tensor | None,
    queue: Tensor,
    temperature: float,
    normalize: bool,
    need_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _result_dtype(q, k_a, queue)

    def row() -> Tensor:
        return q.new_empty(q.shape[0], dtype=dtype)

    return row(), q.new_empty((q.shape[0], q.shape[1] if need_grad else 0), dtype=dtype), row(), row(), row()


class _NoSecondDerivative(torch.autograd.Function):
    """Identity whose backward raises: the returned gradient must not pass silently for a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, query: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the queue losses are differentiable once: their gradient is computed in the forward pass. "
            "Use fastuft.loss.reference for second derivatives."
        )


def _finished(gradient: Tensor, query: Tensor) -> Tensor:
    """The gradient as backward returns it; under ``create_graph=True`` it refuses to be differentiated in the query."""
    return _NoSecondDerivative.apply(gradient, query) if torch.is_grad_enabled() else gradient


def _save_mu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, _, temperature, _, _ = inputs
    _, mu = output
    ctx.mark_non_differentiable(mu)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mu)
    ctx.temperature, ctx.query = (
        temperature,
        z,
    )  # an attribute: the query's values are not needed any more, and may change


def _queue_lse_backward(ctx: Any, grad_lse: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_lse is None:
        return (None,) * 5
    (mu,) = ctx.saved_tensors
    gradient = mu * (grad_lse.detach()[:, None] / ctx.temperature)
    return (_finished(gradient.to(ctx.query.dtype), ctx.query), *[None] * 4)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad, a, b, lse = output
    ctx.mark_non_differentiable(grad, a, b, lse)
    ctx.set_materialize_grads(False)  # outputs without a gradient need no zeros
    ctx.save_for_backward(grad)
    ctx.query = inputs[0]  # an attribute: its values are not needed any more, and may change


def _mixed_info_nce_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 9
    (grad,) = ctx.saved_tensors
    # Upstream scales (1/B, a loss scale) meet the gradient in fp32; the cast to the query's dtype comes last.
    gradient = grad * grad_loss.detach()[:, None]
    return (_finished(gradient.to(ctx.query.dtype), ctx.query), *[None] * 8)


torch.library.register_autograd("fastuft::queue_lse", _queue_lse_backward, setup_context=_save_mu, lib=_library)
torch.library.register_autograd(
    "fastuft::mixed_info_nce", _mixed_info_nce_backward, setup_context=_save_gradient, lib=_library
)

_queue_lse_op = torch.ops.fastuft.queue_lse.default
_mixed_info_nce_op = torch.ops.fastuft.mixed_info_nce.default


class _QueueLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _queue_lse_op(*arguments)
        _save_mu(ctx, arguments, outputs)
        return outputs

    backward = staticmethod(_queue_lse_backward)


class _MixedInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _mixed_info_nce_op(*arguments)
        _save_gradient(ctx, arguments, outputs)
        return outputs

    backward = staticmethod(_mixed_info_nce_backward)


def queue_lse(z: Tensor, queue: Tensor, temperature: float, need_mu: bool, impl: str) -> tuple[Tensor, Tensor]:
    """(lse [B], mu [B, D], or [B, 0] where it is not needed); lse is differentiable in z when mu is computed."""
    arguments = (z, queue, temperature, need_mu, impl)
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and z.requires_grad):
        return _queue_lse_op(*arguments)
    return _QueueLse.apply(*arguments)


def mixed_info_nce(
    q: Tensor,
    k_a: Tensor,
    k_b: Tensor | None,
    lam: Tensor | None,
    queue: Tensor,
    temperature: float,
    normalize: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [B], its gradient [B, D], or [B, 0] where q takes none, a [B], b [B], lse [B]); only loss is differentiable."""
    need_grad = torch.is_grad_enabled() and q.requires_grad
    arguments = (q, k_a, k_b, lam, queue, temperature, normalize, need_grad, impl)
    if torch.compiler.is_compiling() or not need_grad:
        return _mixed_info_nce_op(*arguments)
    return _MixedInfoNCE.apply(*arguments)
