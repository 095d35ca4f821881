"""CutMix boxes, drawn on the host from a seeded generator."""

from __future__ import annotations

import torch
from torch import Tensor


def _beta(alpha: float, n: int, generator: torch.Generator | None) -> Tensor:
    """Beta(alpha, alpha) as float64 [n]: uniform for alpha = 1, otherwise the ratio of two gammas."""
    if alpha == 1:
        return torch.rand(n, dtype=torch.float64, generator=generator)
    gammas = torch._standard_gamma(torch.full((2, n), alpha, dtype=torch.float64), generator)
    total = gammas.sum(0)
    # For tiny alpha, both gammas may underflow to 0; the limit of Beta is then a fair coin.
    coin = torch.rand(n, dtype=torch.float64, generator=generator).round()
    return torch.where(total > 0, gammas[0] / total, coin)


def sample_lambda(n: int, alpha: float = 1.0, *, generator: torch.Generator | None = None) -> Tensor:
    """Mixing weights ~ Beta(alpha, alpha), float32 [n] on the CPU (MixUp).

    Raises:
        ValueError: negative n, or alpha that is not positive.
    """
    if n < 0 or not alpha > 0:
        raise ValueError(f"n={n!r}, alpha={alpha!r}: n must be at least 0 and alpha positive")
    return _beta(alpha, n, generator).float()


def sample_boxes(
    n: int, height: int, width: int, alpha: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """CutMix boxes and their exact mixing weights (Yun et al. 2019; Eq. 5 of Li et al. 2021).

    lambda ~ Beta(alpha, alpha). The box has the rounded sides (H sqrt(1 - lambda), W sqrt(1 - lambda)), is centered at a
    uniformly drawn pixel, and is clipped at the border; lambda is then set to the share outside the clipped box.

    Args:
        n: number of boxes.
        height: height of the images, pixels.
        width: width of the images, pixels.
        alpha: parameter of the Beta distribution.
        generator: a CPU generator; the same state gives the same boxes.

    Returns:
        (boxes int32 [n, 4] as top, left, bottom, right with the last two exclusive; lam float32 [n],
        exactly 1 - area / (height width)), both on the CPU.

    Raises:
        ValueError: a size below 1, negative n, or alpha that is not positive.
    """
    if n < 0 or height < 1 or width < 1:
        raise ValueError(f"n={n!r}, height={height!r}, width={width!r}: n must be at least 0 and the sides at least 1")
    if not alpha > 0:
        raise ValueError(f"alpha={alpha!r} is out of range; it must be positive")
    side = torch.sqrt(1 - _beta(alpha, n, generator))
    center = torch.rand(n, 2, dtype=torch.float64, generator=generator)
    edges = []
    for axis, length in enumerate((height, width)):
        cut = (length * side).round().long()
        start = (length * center[:, axis]).long().clamp_(max=length - 1) - cut // 2
        edges.append((start.clamp(0, length), (start + cut).clamp(0, length)))
    (top, bottom), (left, right) = edges
    area = (bottom - top) * (right - left)
    lam = 1 - area.double() / (height * width)
    return torch.stack([top, left, bottom, right], 1).int(), lam.float()
