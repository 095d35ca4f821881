"""Sampled boxes, and the share of the image outside them."""

from __future__ import annotations

import pytest
import torch

import fastuft


@pytest.mark.parametrize(("alpha", "size"), [(1.0, (32, 32)), (0.2, (32, 32)), (1.0, (48, 20)), (0.2, (20, 48))])
def test_boxes_follow_the_definition(alpha, size):
    """The mean area equals that of the definition over all centers, and lam is exactly the share outside the box."""
    height, width = size
    boxes, lam = fastuft.sample_boxes(100_000, height, width, alpha, torch.Generator().manual_seed(0))
    top, left, bottom, right = boxes.long().unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= height).all() and (right <= width).all()
    area = (bottom - top) * (right - left)
    assert torch.equal(lam, (1 - area.double() / (height * width)).float())

    torch.manual_seed(0)
    concentration = torch.tensor(alpha, dtype=torch.float64)
    shares = torch.distributions.Beta(concentration, concentration).sample((200_000,))
    side = (1 - shares).sqrt()

    def covered(length):
        cut = (length * side).round()
        centers = torch.arange(length, dtype=torch.float64)
        start = centers[None] - torch.div(cut, 2, rounding_mode="floor")[:, None]
        return ((start + cut[:, None]).clamp(0, length) - start.clamp(0, length)).mean(1)

    expected = (covered(height) * covered(width)).mean() / (height * width)
    assert abs(float(area.double().mean()) / (height * width) - float(expected)) < 0.004


def test_boxes_are_reproducible_from_the_generator():
    generator = torch.Generator().manual_seed(3)
    fastuft.sample_boxes(5, 8, 8, 0.4, generator)
    state = generator.get_state()
    first = fastuft.sample_boxes(5, 8, 8, 0.4, generator)
    generator.set_state(state)
    second = fastuft.sample_boxes(5, 8, 8, 0.4, generator)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_tiny_alpha_gives_no_nan():
    _, lam = fastuft.sample_boxes(1000, 16, 16, 1e-4, torch.Generator().manual_seed(0))
    assert lam.isfinite().all() and 0.3 < lam.mean() < 0.75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1, 4, 4), "n=-1"), ((2, 0, 4), "height=0"), ((2, 4, 4, 0.0), "alpha=0.0 is out of range")],
)
def test_impossible_boxes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fastuft.sample_boxes(*arguments)
