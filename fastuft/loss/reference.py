"""The losses in textbook form, with which every other implementation is compared.

Plain PyTorch, differentiable by autograd, with the [B, K] logits stored. z = h / |h| for a query h, tau the temperature,
a = z.k_a / tau, b = z.k_b / tau, S = sum_j exp(z.queue_j / tau):

    Eq. 4:  L_q = -log( e^a / (e^a + S) )
    Eq. 6:  L_m = -( lam log( e^a / (e^a + S) ) + (1 - lam) log( e^b / (e^b + S) ) )

The queue is a matrix of rows: for a :class:`fastuft.KeyQueue`, its ``rows()``. Equation numbers are those of Li et al. 2021,
"Unsupervised Finetuning".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def queue_lse(z: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log sum_j exp(z.queue_j / tau) [B], sum_j softmax_j(z.queue / tau) queue_j [B, D]) for z [B, D], queue [K, D]."""
    logits = z @ queue.T / temperature
    return logits.logsumexp(1), logits.softmax(1) @ queue


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.2, *, normalize: bool = True) -> Tensor:
    """Eq. 4 of each sample [B]; q, k [B, D], queue [K, D]."""
    if normalize:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    positive = (q * k).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device), reduction="none")


def mixed_info_nce(
    q: Tensor,
    k_a: Tensor,
    k_b: Tensor,
    lam: float | Tensor,
    queue: Tensor,
    temperature: float = 0.2,
    *,
    normalize: bool = True,
) -> Tensor:
    """Eq. 6 of each sample [B]; q, k_a, k_b [B, D], lam a number or [B], queue [K, D]."""
    to_a = info_nce(q, k_a, queue, temperature, normalize=normalize)
    to_b = info_nce(q, k_b, queue, temperature, normalize=normalize)
    return lam * to_a + (1 - lam) * to_b
