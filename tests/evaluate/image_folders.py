"""Folders of small images of plain colors, and a network that distinguishes them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastuft.model import Traits


class ColorNet(nn.Module):
    """Mean colors and a few random features of them."""

    num_features, mean, std, traits = 6, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), Traits()

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.bn = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)

    def check_size(self, side, option):
        """It takes every size."""

    def forward(self, x):
        return torch.tanh(self.bn(self.conv(x))).mean((2, 3))


def write_images(root, classes, count, seed):
    """Write ``count`` noisy images per class in its color below ``root``; returns the folder as text."""
    rng = np.random.default_rng(seed)
    for c, name in enumerate(classes):
        for i in range(count):
            pixels = rng.integers(0, 90, (16, 16, 3))
            pixels[:, :, c % 3] += 150
            path = root / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype("uint8")).save(path)
    return str(root)
