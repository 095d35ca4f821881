"""What every backbone is: images in, one row of features per image out, and how its inputs are normalized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

Stem = Literal["imagenet", "small"]
Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


class Backbone(nn.Module, ABC):
    """A network without classifier.

    Args:
        arch: name under which ``build_backbone`` makes it again.
        stem: its stem.
        num_features: width of the features.
        mean, std: normalization of the inputs per channel, for pixels in [0, 1].
        input_size: side in pixels of the images that it was made for; others work where the network takes them.
    """

    def __init__(
        self, arch: str, stem: Stem, *, num_features: int, mean: Triple, std: Triple, input_size: int = 224
    ) -> None:
        super().__init__()
        self.arch, self.stem = arch, stem
        self.num_features = num_features
        self.mean, self.std = mean, std
        self.input_size = input_size

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Pooled features [B, num_features] of normalized images [B, 3, H, W]."""

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)

    if TYPE_CHECKING:  # nn.Module's own returns Any

        def __call__(self, images: Tensor) -> Tensor: ...


def default_input_size(stem: Stem) -> int:
    """Side in pixels of the images that a stem is made for."""
    return 224 if stem == "imagenet" else 32
