"""One torch.library operator a primitive, dispatching to the fused kernels or to the portable path.

Each is functional, computes its gradient in the forward pass and has an autograd formula that only scales it, so
``torch.compile`` sees one opaque call. Gradients cannot be differentiated again: double backward raises.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastuft.loss import portable

_library = torch.library.Library("fastuft", "FRAGMENT")
_library.define("queue_lse(Tensor z, Tensor queue, float temperature, bool need_mu, bool fused) -> (Tensor, Tensor)")
_library.define(
    "mixed_info_nce(Tensor q, Tensor k_a, Tensor? k_b, Tensor? lam, Tensor queue, float temperature, bool normalize, "
    "bool need_grad, bool fused) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def triton_installed() -> bool:
    """Whether the fused kernels can be imported at all."""
    return importlib.util.find_spec("triton") is not None


def fused_reason(q: Tensor, queue: Tensor) -> str | None:
    """Why the fused kernels cannot take these tensors; None where they can."""
    if not triton_installed():
        return "Triton is not installed (pip install triton)"
    from fastuft.kernels import queue_sweep

    return queue_sweep.unsupported(q, queue)


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
def _queue_lse(z: Tensor, queue: Tensor, temperature: float, need_mu: bool, fused: bool) -> tuple[Tensor, Tensor]:
    if fused:
        from fastuft.kernels import queue_sweep

        return queue_sweep.queue_lse_forward(z, queue, temperature, need_mu)
    compute = torch.float64 if torch.float64 in (z.dtype, queue.dtype) else torch.float32
    lse, mu = portable.queue_lse(z.to(compute), queue, temperature, need_mu)
    return lse, mu.clone() if mu.data_ptr() == z.data_ptr() else mu


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
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if fused:
        from fastuft.kernels import queue_sweep

        return queue_sweep.mixed_info_nce_forward(q, k_a, k_b, lam, queue, temperature, normalize, need_grad)
    loss, grad, a, b, lse = portable.mixed_info_nce(q, k_a, k_b, lam, queue, temperature, normalize, need_grad)
    # Outputs of an operator may alias neither its inputs nor each other.
    return loss, grad if need_grad else grad.new_empty(len(q), 0), a, b.clone() if b is a else b, lse


_library.impl("queue_lse", _queue_lse, "CompositeExplicitAutograd")
_library.impl("mixed_info_nce", _mixed_info_nce, "CompositeExplicitAutograd")


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@torch.library.register_fake("fastuft::queue_lse", lib=_library)
def _(z: Tensor, queue: Tensor, temperature: float, need_mu: bool, fused: bool) -> tuple[Tensor, Tensor]:
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
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _result_dtype(q, k_a, queue)

    def row() -> Tensor:
        return q.new_empty(q.shape[0], dtype=dtype)

    return row(), q.new_empty((q.shape[0], q.shape[1] if need_grad else 0), dtype=dtype), row(), row(), row()


class _NoSecondDerivative(torch.autograd.Function):
    """Identity whose backward raises: the returned gradient must not pass silently for a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError(
            "the queue losses are differentiable once: their gradient is computed in the forward pass. "
            "Use fastuft.loss.reference for second derivatives."
        )


def _finished(gradient: Tensor) -> Tensor:
    """The gradient as backward returns it; under ``create_graph=True`` it refuses to be differentiated."""
    return _NoSecondDerivative.apply(gradient.requires_grad_()) if torch.is_grad_enabled() else gradient


def _save_mu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, _, temperature, _, _ = inputs
    _, mu = output
    ctx.mark_non_differentiable(mu)
    ctx.save_for_backward(mu)
    ctx.temperature, ctx.dtype = temperature, z.dtype


def _queue_lse_backward(ctx: Any, grad_lse: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (mu,) = ctx.saved_tensors
    with torch.no_grad():
        gradient = (mu * (grad_lse[:, None] / ctx.temperature)).to(ctx.dtype)
    return _finished(gradient), None, None, None, None


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad, a, b, lse = output
    ctx.mark_non_differentiable(grad, a, b, lse)
    ctx.save_for_backward(grad)
    ctx.dtype = inputs[0].dtype


def _mixed_info_nce_backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    with torch.no_grad():
        # Upstream scales (1/B, a loss scale) meet the gradient in fp32; the cast to the query's dtype comes last.
        gradient = (grad * grad_loss[:, None]).to(ctx.dtype)
    return (_finished(gradient), *[None] * 8)


torch.library.register_autograd("fastuft::queue_lse", _queue_lse_backward, setup_context=_save_mu, lib=_library)
torch.library.register_autograd(
    "fastuft::mixed_info_nce", _mixed_info_nce_backward, setup_context=_save_gradient, lib=_library
)
