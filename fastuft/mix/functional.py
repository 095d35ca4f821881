"""The public mixing functions: they check the tensors and call the registered operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastuft import fused
from fastuft.mix import ops, reference
from fastuft.values import visible

_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _overlaps(images: Tensor) -> bool:
    """Whether two elements may share memory."""
    reach = 0
    for stride, size in sorted((images.stride(d), images.shape[d]) for d in range(4) if images.shape[d] > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _check_images(images: Tensor, *, in_place: bool) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images is {shape}; it must be a tensor [B, C, H, W]")
    if images.dtype not in _DTYPES:
        raise ValueError(f"images has dtype {images.dtype}; allowed: uint8, float16, bfloat16, float32, float64")
    if in_place:
        if images.requires_grad:
            raise ValueError(
                "images requires grad; mixing in place has no gradient: detach it, or use the form without _"
            )
        if _overlaps(images):
            raise ValueError("images overlaps itself in memory (an expanded view?); call .contiguous() first")


def _check_companion(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, images: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype != dtype or tuple(value.shape) != shape:
        found = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {found}; it must be a tensor {list(shape)} of {dtype}")
    if value.device != images.device:
        raise ValueError(f"{name} is on {value.device} but images is on {images.device}; move it there")


def _check_box_values(boxes: Tensor, images: Tensor) -> None:
    top, left, bottom, right = boxes.unbind(1)
    height, width = images.shape[2:]
    good = (top >= 0) & (top <= bottom) & (bottom <= height) & (left >= 0) & (left <= right) & (right <= width)
    if not bool(good.all()):
        worst = int((~good).nonzero()[0])
        raise ValueError(
            f"boxes[{worst}]={boxes[worst].tolist()} does not fit images of {height} x {width}; "
            "allowed: 0 <= top <= bottom <= height, 0 <= left <= right <= width"
        )


def _check_partner_values(partner: Tensor, images: Tensor) -> None:
    count = images.shape[0]
    if count and not bool(((partner >= 0) & (partner < count)).all()):
        raise ValueError(
            f"partner has values from {int(partner.min())} to {int(partner.max())}; allowed: 0 to {count - 1}"
        )


def _check_lam_values(lam: Tensor, images: Tensor) -> None:
    if len(lam) and not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"lam has values from {float(lam.min()):g} to {float(lam.max()):g}; allowed: 0 to 1")


def _check_constant(lam: Tensor) -> None:
    if lam.requires_grad:
        raise ValueError("lam requires grad; the mixing weight is a constant: pass lam.detach()")


Check = Callable[[Tensor, Tensor], None]


def _run(name: str, images: Tensor, companions: Sequence[tuple[Tensor, Check]], *more: int) -> Any:
    """Call an operator by name; the companions' values are checked if the host may read them.

    The extension checks them itself before it writes anything; here they are read only to say what is wrong.
    """
    operator: Callable[..., Any] = getattr(torch.ops.fastuft, name).default
    if images.is_cuda and fused.refusal(fused.MIXING) is not None:
        operator = getattr(reference, name)
    seen = [(value, check) for value, check in companions if visible(value)]
    values = [value for value, _ in companions]
    if not ops.HAS_CPU_EXTENSION:
        for value, check in seen:
            check(value, images)
    if not seen:
        return operator(images, *values, *more)
    try:
        return operator(images, *values, *more)
    except RuntimeError:
        for value, check in seen:
            check(value, images)
        raise


def _pairs(images: Tensor, group: int | None) -> tuple[int, int]:
    """(samples per group, total number of pairs)."""
    count = images.shape[0]
    if group is None:
        return count, count // 2
    if not isinstance(group, int) or group < 1 or count % group:
        raise ValueError(f"group={group!r} does not divide the batch of {count} images; choose a divisor of it")
    return group, count // group * (group // 2)


def _announce_write(images: Tensor) -> None:
    """Tell autograd that the images have changed, so that a backward pass that needs the old values raises an error."""
    if (
        not torch.compiler.is_compiling()
    ):  # compiled programs write mutated inputs back with copy_, which tells autograd
        torch.autograd.graph.increment_version(images)


def cutmix(images: Tensor, boxes: Tensor, partner: Tensor) -> Tensor:
    """CutMix out of place (Eq. 5 of Li et al. 2021): each image with its box taken from its partner.

    Args:
        images: [B, C, H, W] in any layout; uint8, float16, bfloat16, float32 or float64.
        boxes: int32 [B, 4]: top, left, bottom, right, the last two exclusive. On CUDA, clamped to the image.
        partner: int64 [B]; on CUDA, a value out of range gives NaN (0 for uint8).

    Returns:
        A tensor like ``images``; differentiable in it.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU, also values out of range.
    """
    _check_images(images, in_place=False)
    _check_companion("boxes", boxes, (images.shape[0], 4), torch.int32, images)
    _check_companion("partner", partner, (images.shape[0],), torch.int64, images)
    companions = [(boxes, _check_box_values), (partner, _check_partner_values)]
    mixed: Tensor = _run("cutmix", images, companions)
    return mixed


def cutmix_(images: Tensor, boxes: Tensor, group: int | None = None) -> Tensor:
    """CutMix in place: sample i swaps its box with sample B - 1 - i; if B is odd, the middle sample is unchanged.

    Both samples of a pair keep the same share of themselves, 1 - area / (H W). Only the boxes are written. With ``group``,
    samples pair in this way within each ``group`` consecutive samples.

    Args:
        images: [B, C, H, W] in any layout without overlap, not requiring grad.
        boxes: int32 [B // 2, 4], as for :func:`cutmix`; with ``group``, [B / group (group // 2), 4], group by group.
        group: number of consecutive samples that pair among themselves, a divisor of B; by default all.

    Returns:
        ``images``.

    Raises:
        ValueError: as for :func:`cutmix`, before anything is written.
    """
    _check_images(images, in_place=True)
    size, pairs = _pairs(images, group)
    _check_companion("boxes", boxes, (pairs, 4), torch.int32, images)
    _run("cutmix_", images, [(boxes, _check_box_values)], size)
    _announce_write(images)
    return images


def mixup(images: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """MixUp out of place: lam x_i + (1 - lam) x_partner(i), computed in fp32 and rounded once (bytes: half to even).

    Args:
        images: as for :func:`cutmix`.
        lam: float32 [B] in [0, 1]; on CUDA, other values give NaN.
        partner: as for :func:`cutmix`.

    Returns:
        A tensor like ``images``; differentiable in it.

    Raises:
        ValueError: as for :func:`cutmix`.
    """
    _check_images(images, in_place=False)
    _check_companion("lam", lam, (images.shape[0],), torch.float32, images)
    _check_constant(lam)
    _check_companion("partner", partner, (images.shape[0],), torch.int64, images)
    companions = [(lam, _check_lam_values), (partner, _check_partner_values)]
    mixed: Tensor = _run("mixup", images, companions)
    return mixed


def mixup_(images: Tensor, lam: Tensor, group: int | None = None) -> Tensor:
    """MixUp in place: samples i and B - 1 - i both become a mix, in which each weights itself by lam[i].

    With ``group``, samples pair in this way within each ``group`` consecutive samples.

    Args:
        images: as for :func:`cutmix_`.
        lam: float32 [B // 2] in [0, 1]; on CUDA, other values give NaN. With ``group``, [B / group (group // 2)].
        group: as for :func:`cutmix_`.

    Returns:
        ``images``.

    Raises:
        ValueError: as for :func:`cutmix`, before anything is written.
    """
    _check_images(images, in_place=True)
    size, pairs = _pairs(images, group)
    _check_companion("lam", lam, (pairs,), torch.float32, images)
    _check_constant(lam)
    _run("mixup_", images, [(lam, _check_lam_values)], size)
    _announce_write(images)
    return images
