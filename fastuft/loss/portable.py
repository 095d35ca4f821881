"""The one-pass loss in plain PyTorch: any device, no [B, K] tensor, gradient computed in the forward pass.

Keys and queue are constants, so with s_a = sigmoid(lse - a), s_b = sigmoid(lse - b), w = lam s_a + (1 - lam) s_b:

    (1)  dL/dz = (w mu - lam s_a k_a - (1 - lam) s_b k_b) / tau
    (2)  dL/dh = (g - (g.z) z) / |h|        for z = h / |h|, g = dL/dz

where lse and mu = sum_j softmax_j queue_j come from one attention-like sweep with V = K = queue. On a CPU that sweep is
PyTorch's own flash attention, which returns lse, over parts of the queue that a cache holds; elsewhere, and for
half-precision queues, it is chunked here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-12  # shorter rows count as zero: their gradient is 0, as for torch's normalize with its default eps
_ROWS = 1024
_KEYS = 1024
_PART_BYTES = 1 << 21  # of the queue: a part stays in a core's cache while all blocks of rows meet it
_PARTS = 8  # given to the attention operator at once, as its heads
_PARTIAL_BYTES = 1 << 22  # of their mu


def normalize_rows(h: Tensor) -> tuple[Tensor, Tensor]:
    """(h / |h| [B, D], 1 / |h| [B, 1], 0 for rows shorter than EPSILON); squares neither overflow nor underflow."""
    largest = h.abs().amax(1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
    scaled = h / largest
    relative = scaled.norm(dim=1, keepdim=True)
    norm = relative * largest
    zero = norm < EPSILON
    z = torch.where(zero, h / EPSILON, scaled / relative.clamp_min(EPSILON))
    return z, torch.where(zero, 0, 1 / norm.clamp_min(EPSILON))


def _sweep_chunked(z: Tensor, queue: Tensor, temperature: float, need_mu: bool) -> tuple[Tensor, Tensor]:
    """Online softmax over tiles of rows and keys; keys are brought to z's dtype tile by tile."""
    all_lse, all_mu = [], []
    for rows in (z / temperature).split(_ROWS):
        running_max = rows.new_full((len(rows), 1), -torch.inf)
        total = rows.new_zeros(len(rows), 1)
        weighted = rows.new_zeros(rows.shape)
        for tile in queue.split(_KEYS):
            keys = tile.to(rows.dtype)
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
    """The same by the CPU's attention operator with V = K, which merges tiles online; parts of the queue merge here."""
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


def queue_lse(z: Tensor, queue: Tensor, temperature: float, need_mu: bool) -> tuple[Tensor, Tensor]:
    """(lse [B], mu [B, D]) in z's dtype for z [B, D], queue [K, D]; mu is [B, 0] where it is not needed."""
    if len(queue) == 0:
        return z.new_full((len(z),), -torch.inf), z.new_zeros(len(z), z.shape[1] if need_mu else 0)
    # That operator reads each row as consecutive elements, whatever its strides say.
    if need_mu and z.device.type == "cpu" and queue.dtype == z.dtype and queue.stride(1) == 1:
        return _sweep_attention(z.contiguous(), queue, temperature)
    return _sweep_chunked(z, queue, temperature, need_mu)


def mixed_info_nce(
    q: Tensor,
    k_a: Tensor,
    k_b: Tensor | None,
    lam: Tensor | None,
    queue: Tensor,
    temperature: float,
    normalize: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [B], dloss/dq [B, D], a [B], b [B], lse [B]) of each sample; Eq. 4 where k_b is None.

    Computed in fp32, or fp64 where an input is; the gradient is [B, 0] where it is not needed.
    """
    compute = torch.float64 if torch.float64 in (q.dtype, k_a.dtype, queue.dtype) else torch.float32
    h = q.to(compute)
    z, inverse_norm = normalize_rows(h) if normalize else (h, None)
    a_key = k_a.to(compute)
    a_key = normalize_rows(a_key)[0] if normalize else a_key
    a = (z * a_key).sum(1) / temperature
    lse, mu = queue_lse(z, queue, temperature, need_grad)
    loss = F.softplus(lse - a, threshold=50)
    b = a
    if need_grad:
        towards_a = torch.sigmoid(lse - a)
        weight, pulled = towards_a, towards_a[:, None] * a_key
    if k_b is not None and lam is not None:
        b_key = k_b.to(compute)
        b_key = normalize_rows(b_key)[0] if normalize else b_key
        b = (z * b_key).sum(1) / temperature
        lam = lam.to(compute)
        loss = lam * loss + (1 - lam) * F.softplus(lse - b, threshold=50)
        if need_grad:
            towards_b = (1 - lam) * torch.sigmoid(lse - b)
            weight = lam * towards_a + towards_b
            pulled = (lam * towards_a)[:, None] * a_key + towards_b[:, None] * b_key
    if not need_grad:
        return loss, z.new_empty(len(z), 0), a, b, lse
    grad = (weight[:, None] * mu - pulled) / temperature  # (1)
    if inverse_norm is not None:
        grad = (grad - (grad * z).sum(1, keepdim=True) * z) * inverse_norm  # (2)
    return loss, grad, a, b, lse
