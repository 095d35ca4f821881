"""Any timm network as a backbone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastuft.model.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, Traits, Triple


def _triple(values: object, default: Triple) -> Triple:
    """One value per color channel; networks with other channels get the default."""
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        return default
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _create(name: str, drop_path: float) -> nn.Module:
    """A timm network without its classifier; ViTs resample their position embeddings to the size of the images.

    Raises:
        ValueError: timm is not installed, has no such network, or the network has no stochastic depth.
    """
    arch = f"timm:{name}"
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"model.arch={arch!r} needs timm; pip install timm, or choose another network") from error
    if not timm.is_model(name):
        raise ValueError(f"model.arch={arch!r}: timm has no model {name!r}; timm.list_models() names them")
    options: dict[str, Any] = {"dynamic_img_size": True, **({"drop_path_rate": drop_path} if drop_path else {})}
    while True:
        try:
            network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
            return network
        except TypeError as error:  # timm passes every option on to the network
            refused = next((option for option in options if option in str(error)), None)
            if refused == "drop_path_rate":
                raise ValueError(f"model.drop_path={drop_path} is not available for {arch}; leave it at 0") from error
            if refused is None:
                raise
            del options[refused]


class TimmBackbone(Backbone):
    """A randomly initialized timm network without its classifier.

    Args:
        name: name of the network in timm.
        drop_path: rate of stochastic depth in its last block.

    Raises:
        ValueError: timm is not installed or has no such network.
    """

    network: nn.Module

    def __init__(self, name: str, drop_path: float = 0.0) -> None:
        network = _create(name, drop_path)
        settings = getattr(network, "pretrained_cfg")  # noqa: B009  # only timm's networks have it
        super().__init__(
            f"timm:{name}",
            "imagenet",
            # A layer between pooling and classifier may change the width; timm has a separate attribute for that.
            num_features=int(getattr(network, "head_hidden_size", None) or network.num_features),  # type: ignore[arg-type]
            mean=_triple(settings.get("mean"), IMAGENET_MEAN),
            std=_triple(settings.get("std"), IMAGENET_STD),
            input_size=int(settings.get("input_size", (3, 224, 224))[-1]),
        )
        self.network = network

    def adopt(self, traits: Traits) -> None:
        if traits.pool != "own":
            tokens = getattr(self.network, "num_prefix_tokens", None)
            if tokens is None or getattr(self.network, "attn_pool", None) is not None:
                raise ValueError(
                    f"model.pool={traits.pool!r} is for ViTs that pool by their tokens, and {self.arch} does not; leave it at "
                    "'own'"
                )
            if traits.pool == "cls" and getattr(self.network, "cls_token", None) is None:
                raise ValueError(f"model.pool='cls': {self.arch} has no class token; choose mean, or leave it at 'own'")
        super().adopt(replace(traits, pool="own"))
        self.traits = traits

    @property
    def patch(self) -> int | None:
        side = getattr(getattr(self.network, "patch_embed", None), "patch_size", None)
        return int(side[0]) if side is not None and getattr(self.network, "dynamic_img_size", False) else None

    def check_size(self, side: int, option: str) -> None:
        patch = self.patch
        if patch is None:
            embed = getattr(self.network, "patch_embed", None)
            made_for = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", False) else None
            if made_for is not None and side != made_for[0]:
                raise ValueError(f"{option}={side}: {self.arch} takes images of {made_for[0]} pixels only; choose that")
        elif side % patch:
            near = max(side // patch, 1) * patch
            raise ValueError(
                f"{option}={side}: {self.arch} takes images whose side is a multiple of its patch's, {patch} pixels; "
                f"choose {near} or {near + patch}"
            )

    def patch_projection(self) -> list[nn.Parameter]:
        projection = getattr(getattr(self.network, "patch_embed", None), "proj", None)
        return list(projection.parameters()) if isinstance(projection, nn.Module) else []

    def undecayed(self) -> Collection[str]:
        spared = getattr(self.network, "no_weight_decay", None)
        return tuple(f"network.{pattern}" for pattern in spared()) if spared is not None else ()

    def layers(self) -> dict[str, int]:
        matcher = getattr(self.network, "group_matcher", None)
        if matcher is None:
            return super().layers()
        from timm.models import group_parameters

        depths: dict[str, int] = group_parameters(self.network, matcher(coarse=False), reverse=True)
        return {f"network.{name}": depth for name, depth in depths.items()}

    def checkpoint_activations(self) -> None:
        try:
            self.network.set_grad_checkpointing(enable=True)  # type: ignore[operator]
        except (AttributeError, AssertionError, TypeError) as error:
            raise ValueError(
                f"runtime.checkpoint_activations=True is not available for {self.arch}; set it to false"
            ) from error
        super().checkpoint_activations()

    def features(self, images: Tensor) -> Tensor:
        """Pooled features [B, num_features] of normalized images [B, 3, H, W].

        Raises:
            ValueError: the features have another shape, or the network does not take images of this size.
        """
        height, width = images.shape[2:]
        for side in {height, width}:
            self.check_size(side, "size")
        features: Tensor = self._pooled(images) if self.traits.pool != "own" else self.network(images)
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f"model.arch={self.arch!r} returns features of shape {tuple(features.shape)}, expected "
                f"{(len(images), self.num_features)}; choose a network that pools its features"
            )
        return features

    def _pooled(self, images: Tensor) -> Tensor:
        """The class token, or the mean of the patch tokens, each after the network's last norm."""
        tokens: Tensor = self.network.forward_features(images)  # type: ignore[operator]  # [B, N, C]
        others = int(self.network.num_prefix_tokens)  # type: ignore[arg-type]  # class and registers
        pooled = tokens[:, 0] if self.traits.pool == "cls" else tokens[:, others:].mean(1)
        norm = getattr(self.network, "fc_norm", None)  # follows the pooling in networks that average
        return pooled if norm is None else norm(pooled)
