"""One measure for all numerics: our error against float64, compared with that of PyTorch's expression in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

VALUE, GRADIENT = 2.0, 3.0  # how many times PyTorch's error ours may be
FLOOR = 1e-5


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest deviation divided by the largest exact magnitude; infinite if a value is not finite but should be."""
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    if found.shape != exact.shape:
        return float("inf")
    same = (found == exact) | (found.isnan() & exact.isnan())
    deviation = torch.where(same, 0, (found - exact).abs())
    if not deviation.isfinite().all():
        return float("inf")
    if deviation.numel() == 0:
        return 0.0
    scale = exact[exact.isfinite()].abs().max() if exact.isfinite().any() else torch.tensor(1.0)
    return float(deviation.max() / scale.clamp_min(1e-30))


def assert_as_good(found: Tensor, exact: Tensor, pytorch: Tensor | list[Tensor], times: float) -> None:
    """Our error is at most ``times`` PyTorch's (of several, the largest), plus the floor."""
    others = pytorch if isinstance(pytorch, list) else [pytorch]
    ours, theirs = relative_error(found, exact), max(relative_error(other, exact) for other in others)
    assert ours <= times * theirs + FLOOR, f"error {ours:.3g}, PyTorch's {theirs:.3g}, allowed {times} times that"
