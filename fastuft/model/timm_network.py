"""Any network of timm as a backbone."""

from __future__ import annotations

from torch import Tensor, nn

from fastuft.model.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, Triple


def _triple(values: object, default: Triple) -> Triple:
    """A value per color channel; networks of other channels keep the default."""
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        return default
    red, green, blue = (float(value) for value in values)
    return red, green, blue


class TimmBackbone(Backbone):
    """A timm network without its classifier, randomly initialized.

    Args:
        name: timm's name of it.

    Raises:
        ValueError: timm is not installed or has no such network.
    """

    network: nn.Module

    def __init__(self, name: str) -> None:
        arch = f"timm:{name}"
        try:
            import timm
        except ImportError as error:
            raise ValueError(f"model.arch={arch!r} needs timm; pip install timm, or choose another network") from error
        if not timm.is_model(name):
            raise ValueError(f"model.arch={arch!r}: timm has no model {name!r}; timm.list_models() names them")
        network = timm.create_model(name, pretrained=False, num_classes=0)
        settings = network.pretrained_cfg
        super().__init__(
            arch,
            "imagenet",
            # A layer between pooling and classifier may change the width; timm names the width behind it apart.
            num_features=int(getattr(network, "head_hidden_size", None) or network.num_features),
            mean=_triple(settings.get("mean"), IMAGENET_MEAN),
            std=_triple(settings.get("std"), IMAGENET_STD),
            input_size=int(settings.get("input_size", (3, 224, 224))[-1]),
        )
        self.network = network

    def features(self, images: Tensor) -> Tensor:
        """Pooled features [B, num_features] of normalized images [B, 3, H, W].

        Raises:
            ValueError: the network gives something else.
        """
        features: Tensor = self.network(images)
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f"model.arch={self.arch!r} gives features of shape {tuple(features.shape)}, expected "
                f"{(len(images), self.num_features)}; choose a network that pools its features"
            )
        return features
