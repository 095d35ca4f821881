"""CutMix and MixUp in plain PyTorch: the reference for the extension, which runs if that is not built."""

from __future__ import annotations

import torch
from torch import Tensor


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """bool [B, 1, height, width], true inside each box (top, left, bottom, right)."""
    top, left, bottom, right = (edge[:, None] for edge in boxes.to(torch.int64).unbind(1))
    y = torch.arange(height, device=boxes.device)
    x = torch.arange(width, device=boxes.device)
    rows = (y >= top) & (y < bottom)
    columns = (x >= left) & (x < right)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def gather_partners(images: Tensor, partner: Tensor) -> Tensor:
    """images[partner]; on CUDA, where the host must not read values, a partner out of range gives NaN (0 for bytes)."""
    if not images.is_cuda:
        return images[partner]
    count = images.shape[0]
    valid = (partner >= 0) & (partner < count)
    poison = torch.nan if images.is_floating_point() else 0
    return torch.where(valid.view(-1, 1, 1, 1), images[partner.clamp(0, count - 1)], poison)


def cutmix(images: Tensor, boxes: Tensor, partner: Tensor) -> Tensor:
    """Eq. 5: each image with its box taken from its partner. Differentiable."""
    mask = box_mask(boxes, images.shape[2], images.shape[3])
    return torch.where(mask, gather_partners(images, partner), images)


def _halves(images: Tensor, companion: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(view of each group's first half, view of its last half, that half in pairing order, companion by group)."""
    groups = images.unflatten(0, (-1, group or images.shape[0]))
    half = groups.shape[1] // 2
    last = groups[:, groups.shape[1] - half :]
    return groups[:, :half], last, last.flip(1), companion.unflatten(0, (groups.shape[0], half))


def cutmix_(images: Tensor, boxes: Tensor, group: int = 0) -> None:
    """In place: within each ``group`` of samples (0: the whole batch), sample i swaps its box with the i-th from the end."""
    if len(boxes):
        mask = box_mask(boxes, images.shape[2], images.shape[3])
        first, tail, last, mask = _halves(images, mask, group)
        swapped = torch.where(mask, first, last)
        first.copy_(torch.where(mask, last, first))
        tail.copy_(swapped.flip(1))


def _blend(first: Tensor, last: Tensor, lam: Tensor) -> Tensor:
    """lam first + (1 - lam) last in fp32 (fp64 for fp64), rounded once; bytes round half to even."""
    compute = torch.float64 if first.dtype == torch.float64 else torch.float32
    weight = lam.to(compute)[..., None, None, None]
    mixed = weight * first.to(compute) + (1 - weight) * last.to(compute)
    return mixed.to(first.dtype) if first.is_floating_point() else mixed.round().to(first.dtype)


def mixup(images: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """lam x_i + (1 - lam) x_partner(i). Differentiable for floating images."""
    return _blend(images, gather_partners(images, partner), lam)


def mixup_(images: Tensor, lam: Tensor, group: int = 0) -> None:
    """In place: within each ``group`` of samples (0: the whole batch), sample i and the i-th from the end become a mix.

    Each weights itself by lam[i].
    """
    if len(lam):
        first, tail, last, weight = _halves(images, lam, group)
        mixed = _blend(first, last, weight), _blend(last, first, weight)
        first.copy_(mixed[0])
        tail.copy_(mixed[1].flip(1))
