"""References for losses: float64, and the errors that the dtype of the tiles causes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastuft.loss import reference

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k_a, k_b, lam, queue


def in_dtype(tensors: Tensors, dtype: torch.dtype, temperature: float = 0.2, normalize: bool = True):
    """(loss [B], gradient of its sum in q) by PyTorch's own expression in a dtype."""
    q, k_a, k_b, lam, queue = (t.detach().to(dtype) for t in tensors)
    q = q.clone().requires_grad_()
    loss = reference.mixed_info_nce(q, k_a, k_b, lam, queue, temperature, normalize=normalize)
    return loss.detach(), torch.autograd.grad(loss.sum(), q)[0]


def with_rounded_tiles(tensors: Tensors, dtype: torch.dtype, temperature: float = 0.2, normalize: bool = True):
    """The same in float64, with unit queries and queue rounded once to a dtype, an error that no sum over tiles can avoid."""
    q, k_a, k_b, lam, queue = (t.detach().double() for t in tensors)
    q = q.clone().requires_grad_()
    z, k_a, k_b = (F.normalize(t, dim=1) if normalize else t for t in (q, k_a, k_b))
    logits = (z + (z.to(dtype).double() - z).detach()) @ queue.to(dtype).double().T / temperature
    lse = logits.logsumexp(1)
    to_a, to_b = (F.softplus(lse - (z * k).sum(1) / temperature, threshold=50) for k in (k_a, k_b))
    loss = lam * to_a + (1 - lam) * to_b
    return loss.detach(), torch.autograd.grad(loss.sum(), q)[0]


def comparisons(tensors: Tensors, dtype: torch.dtype, temperature: float = 0.2, normalize: bool = True):
    """([losses], [gradients]) to compare with if tiles are multiplied in ``dtype``."""
    made = [way(tensors, dtype, temperature, normalize) for way in (in_dtype, with_rounded_tiles)]
    return [loss for loss, _ in made], [gradient for _, gradient in made]
