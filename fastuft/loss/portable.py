"""The one-pass loss in plain PyTorch: any device, no [B, K] tensor, gradient computed in the forward pass.

The derivation, equations (1) to (7), is in ``kernels/queue_sweep.py``; lse and mu (3) come from one attention-like sweep with
V = K = queue. On a CPU, that sweep is PyTorch's own flash attention, which returns lse, over parts of the queue that fit a
cache. On other devices, and for half-precision queues, it runs here in chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastuft.kernels.problem import Problem
from fastuft.loss import fp8

EPSILON = 1e-12  # shorter rows count as zero and get no gradient, as in torch's normalize with its default eps
_ROWS = 1024
_KEYS = 1024
_PART_BYTES = 1 << 21  # bytes of a part of the queue, which stays in a core's cache while all blocks of rows use it
_PARTS = 8  # parts passed to the attention operator at once, as its heads
_PARTIAL_BYTES = 1 << 22  # bytes of their mu


class Queue(NamedTuple):
    """Rows [K, D], with ``scales`` [K] if they are codes of an fp8 queue."""

    rows: Tensor
    scales: Tensor | None

    def tile(self, start: int, dtype: torch.dtype) -> Tensor:
        """At most _KEYS rows from ``start`` on, in dtype."""
        tile = self.rows[start : start + _KEYS]
        return tile.to(dtype) if self.scales is None else fp8.decode(tile, self.scales[start : start + _KEYS], dtype)


def normalize_rows(h: Tensor) -> tuple[Tensor, Tensor]:
    """(h / |h| [B, D], 1 / |h| [B, 1] or 0 for rows shorter than EPSILON); squares neither overflow nor underflow."""
    largest = h.abs().amax(1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
    scaled = h / largest
    relative = scaled.norm(dim=1, keepdim=True)
    norm = relative * largest
    zero = norm < EPSILON
    z = torch.where(zero, h / EPSILON, scaled / relative.clamp_min(EPSILON))
    return z, torch.where(zero, 0, 1 / norm.clamp_min(EPSILON))


def _plain_lengths(lengths: Tensor) -> bool:
    """Whether the host sees that no square of these rows overflowed or underflowed."""
    if not lengths.numel():
        return False
    shortest, longest = torch.aminmax(lengths)
    return shortest.item() >= EPSILON and longest.item() < 1e18


def _sweep_chunked(z: Tensor, queue: Queue, temperature: float, need_mu: bool) -> tuple[Tensor, Tensor]:
    """Online softmax over tiles of rows and keys; keys are converted to z's dtype tile by tile."""
    all_lse, all_mu = [], []
    for rows in (z / temperature).split(_ROWS):
        running_max = rows.new_full((len(rows), 1), -torch.inf)
        total = rows.new_zeros(len(rows), 1)
        weighted = rows.new_zeros(rows.shape)
        for start in range(0, len(queue.rows), _KEYS):
            keys = queue.tile(start, rows.dtype)
            scores = rows @ keys.T
            new_max = torch.maximum(running_max, scores.amax(1, keepdim=True))
            weights = scores.sub_(new_max).exp_()
            correction = torch.exp(running_max - new_max)
            total = total * correction + weights.sum(1, keepdim=True)
            if need_mu:
                weighted = torch.addmm(weighted * correction, weights, keys)
            running_max = new_max
        all_lse.append((running_max + total.log()).squeeze(1))
        all_mu.append(weighted / total if need_mu else rows.new_empty(len(rows), 0))
    return torch.cat(all_lse), torch.cat(all_mu)


def _attend(z: Tensor, parts: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(lse [B, 1], mu [B, D]) over all parts [S, k, D]."""
    mu, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        z.expand(1, len(parts), *z.shape), parts[None], parts[None], scale=1 / temperature
    )
    by_part = lse.view(len(parts), len(z)).to(z.dtype)
    if len(parts) == 1:
        return by_part.T, mu.view(z.shape)
    total = by_part.logsumexp(0)
    shares = torch.exp(by_part - total).T  # [B, S]
    return total[:, None], (shares[:, None] @ mu[0].transpose(0, 1)).squeeze(1)


def _sweep_attention(z: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same with the CPU's attention operator and V = K, which merges tiles online; parts of the queue merge here."""
    size, width = z.element_size(), z.shape[1]
    part = max(_KEYS, _PART_BYTES // (size * width))
    whole = len(queue) // part * part
    groups = list(queue[:whole].unflatten(0, (whole // part, part)).split(_PARTS)) if whole else []
    if whole < len(queue):
        groups.append(queue[whole:][None])
    all_lse, all_mu = [], []
    for rows in z.split(max(1, _PARTIAL_BYTES // (_PARTS * size * width))):
        lse, mu = _attend(rows, groups[0], temperature)
        for parts in groups[1:]:
            more_lse, more_mu = _attend(rows, parts, temperature)
            total = torch.logaddexp(lse, more_lse)
            mu = mu * torch.exp(lse - total) + more_mu * torch.exp(more_lse - total)
            lse = total
        all_lse.append(lse.squeeze(1))
        all_mu.append(mu)
    return torch.cat(all_lse), torch.cat(all_mu)


def queue_lse(z: Tensor, queue: Queue, temperature: float, need_mu: bool) -> tuple[Tensor, Tensor]:
    """(lse [B], mu [B, D]) in z's dtype for z [B, D], queue [K, D]; mu is [B, 0] if it is not needed."""
    rows = queue.rows
    if len(rows) == 0:
        return z.new_full((len(z),), -torch.inf), z.new_zeros(len(z), z.shape[1] if need_mu else 0)
    # The operator reads each row as consecutive elements, whatever its strides are.
    if need_mu and z.device.type == "cpu" and rows.dtype == z.dtype and rows.stride(1) == 1:
        return _sweep_attention(z.contiguous(), rows, temperature)
    return _sweep_chunked(z, queue, temperature, need_mu)


def _pull(lse: Tensor, z: Tensor, key: Tensor, weight: Tensor | float, temperature: float) -> tuple[Tensor, ...]:
    """(z.k / tau, its part of the loss (5), weight sigmoid(lse - z.k / tau)) for keys k [B, D] with this weight."""
    logit = (z * key).sum(1) / temperature
    return logit, weight * F.softplus(lse - logit, threshold=50), weight * torch.sigmoid(lse - logit)


def mixed_info_nce(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [B], dloss/dq [B, D], alignment [B]) of each sample; the gradient is [B, 0] if it is not needed.

    It is computed in fp32, or in fp64 if an input is fp64. A weight outside [0, 1] gives NaN.
    """
    q, k_a, k_b, lam, queue, scales, temperature, normalize = problem[:8]
    compute = torch.float64 if torch.float64 in (q.dtype, k_a.dtype, queue.dtype) else torch.float32

    def unit(rows: Tensor) -> Tensor:
        return normalize_rows(rows.to(compute))[0] if normalize else rows.to(compute)

    z, inverse_norm = normalize_rows(q.to(compute)) if normalize else (q.to(compute), None)
    lse, mu = queue_lse(z, Queue(queue, scales), temperature, problem.need_grad)
    weight: Tensor | float = 1.0
    if lam is not None:
        lam = lam.to(compute)
        weight = torch.where((lam >= 0) & (lam <= 1), lam, torch.nan)
    key = unit(k_a)
    logit, loss, pull = _pull(lse, z, key, weight, temperature)
    alignment, pulled = -weight * logit, pull[:, None] * key
    if k_b is not None:
        key = unit(k_b)
        logit, more, pull_b = _pull(lse, z, key, 1 - weight, temperature)
        alignment, loss, pull, pulled = (
            alignment - (1 - weight) * logit,
            loss + more,
            pull + pull_b,
            pulled + pull_b[:, None] * key,
        )
    if not problem.need_grad:
        return loss, z.new_empty(len(z), 0), alignment
    grad = (pull[:, None] * mu - pulled) / temperature  # (6)
    if inverse_norm is not None:
        grad = (grad - (grad * z).sum(1, keepdim=True) * z) * inverse_norm  # (7)
    return loss, grad, alignment


def enqueue_(queue: Tensor, scales: Tensor | None, pointer: Tensor, keys: Tensor) -> None:
    """Write the unit rows of keys [B, D] into queue [K, D] from ``pointer`` (int64 scalar) on, wrapping, and advance it.

    ``scales`` [K] of an fp8 queue are written with it. Of more than K keys, the last K stay. On a GPU, nothing waits, because
    the host does not read the pointer.
    """
    if queue.device.type == "cpu":
        _enqueue_on_host(queue, scales, pointer, keys)
        return
    size = len(queue)
    kept = keys[-size:].to(torch.promote_types(queue.dtype, torch.float32))
    slots = (pointer + len(keys) - len(kept) + torch.arange(len(kept), device=queue.device)) % size
    for target, new in _stored(normalize_rows(kept)[0], queue, scales):
        target.index_copy_(0, slots, new.to(target.dtype))
    pointer.add_(len(keys)).remainder_(size)


def _enqueue_on_host(queue: Tensor, scales: Tensor | None, pointer: Tensor, keys: Tensor) -> None:
    """The same in fewer and larger steps, for which the host reads the pointer."""
    size, count, start = len(queue), len(keys), int(pointer.item())
    dtype = queue.dtype if queue.dtype in (torch.float32, torch.float64) else torch.float32
    kept = (keys if count <= size else keys[-size:]).to(dtype)
    first = (start + count - len(kept)) % size
    head = min(len(kept), size - first)
    lengths = torch.linalg.vector_norm(kept, dim=1, keepdim=True)
    plain = _plain_lengths(lengths)
    if plain and scales is None and head == len(kept):
        torch.div(kept, lengths, out=queue[first : first + head])
    else:
        for target, new in _stored(kept / lengths if plain else normalize_rows(kept)[0], queue, scales):
            target[first : first + head] = new[:head]
            if head < len(new):
                target[: len(new) - head] = new[head:]
    pointer.fill_((start + count) % size)


def _stored(rows: Tensor, queue: Tensor, scales: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """(buffer, rows for it) of each buffer of a queue: the rows, or their codes and scales."""
    if scales is None:
        return [(queue, rows)]
    codes, lengths = fp8.encode(rows)
    return [(queue, codes), (scales, lengths)]
