"""The interface of all backbones: from images to one row of features per image, with the normalization of the inputs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

Stem = Literal["imagenet", "small"]
Pool = Literal["own", "cls", "mean"]
Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Traits:
    """How a checkpoint's network differs from the network with the same name, apart from its weights.

    Args:
        mean, std: normalization that it was trained with; None is the network's own.
        norm_eps: (shell pattern of LayerNorms, their epsilon).
        stride_in_1x1: bottlenecks take their stride in the first 1x1 convolution, as the first ResNets did, instead
            of in the 3x3 one.
        pool: features of a ViT: cls, mean (of the patch tokens), or the network's own.
    """

    mean: Triple | None = None
    std: Triple | None = None
    norm_eps: tuple[tuple[str, float], ...] = ()
    stride_in_1x1: bool = False
    pool: Pool = "own"


def as_triple(values: object, name: str) -> Triple:
    """Three finite numbers, one per color channel.

    Raises:
        ValueError: anything else.
    """
    numbers = [float(v) for v in values if isinstance(v, (int, float))] if isinstance(values, (list, tuple)) else []
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{name}={values!r} is not three numbers, one per color")
    return numbers[0], numbers[1], numbers[2]


class Backbone(nn.Module, ABC):
    """A network without a classifier.

    Args:
        arch: name with which ``build_backbone`` builds it.
        stem: its stem.
        num_features: width of the features.
        mean, std: normalization of the inputs per channel, for pixels in [0, 1].
        input_size: side in pixels of the images that it was designed for; some networks take others.

    ``recompute`` tells whether activations are recomputed in the backward pass.
    """

    recompute = False

    def __init__(
        self, arch: str, stem: Stem, *, num_features: int, mean: Triple, std: Triple, input_size: int = 224
    ) -> None:
        super().__init__()
        self.arch, self.stem = arch, stem
        self.num_features = num_features
        self.mean, self.std = mean, std
        self.input_size = input_size
        self.traits = Traits()

    def adopt(self, traits: Traits) -> None:
        """Adopt the traits of a checkpoint's network, before anything is computed.

        Raises:
            ValueError: this network cannot have such a trait.
        """
        if traits.stride_in_1x1:
            raise ValueError(
                f"the checkpoint's bottlenecks have their stride in 1x1 convolutions, but {self.arch} has no bottlenecks"
            )
        if traits.pool != "own":
            raise ValueError(
                f"model.pool={traits.pool!r} is for ViTs, and {self.arch} has no tokens; leave it at 'own'"
            )
        self.mean, self.std = traits.mean or self.mean, traits.std or self.std
        for pattern, eps in traits.norm_eps:
            for name, module in self.named_modules():
                if isinstance(module, nn.LayerNorm) and fnmatchcase(name, pattern):
                    module.eps = eps
        self.traits = traits

    @property
    def patch(self) -> int | None:
        """Side of the patches in pixels, of which the sides of images are multiples; None if the network has no patches."""
        return None

    def check_size(self, side: int, option: str) -> None:
        """Raise ValueError if the network cannot take square images of ``side`` pixels; the message names ``option``."""

    def patch_projection(self) -> list[nn.Parameter]:
        """Parameters of the projection of patches to tokens; empty if there is none."""
        return []

    def undecayed(self) -> Collection[str]:
        """Shell patterns of parameters without weight decay, besides all vectors."""
        return ()

    def layers(self) -> dict[str, int]:
        """The depth of each parameter's layer; 0 is nearest to the images.

        Raises:
            ValueError: the order of the layers is unknown.
        """
        raise ValueError(f"optim.layer_decay: the order of the layers of {self.arch} is not known; set it to 1")

    def checkpoint_activations(self) -> None:
        """Recompute each block's activations in the backward pass instead of storing them.

        Raises:
            ValueError: the network does not support it.
        """
        self.recompute = True

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Pooled features [B, num_features] of normalized images [B, 3, H, W]."""

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, num_features] of normalized images [B, 3, H, W]."""
        return self.features(images)

    if TYPE_CHECKING:  # nn.Module's own returns Any

        def __call__(self, images: Tensor) -> Tensor: ...


def default_input_size(stem: Stem) -> int:
    """Side of the images that a stem is designed for, in pixels."""
    return 224 if stem == "imagenet" else 32
