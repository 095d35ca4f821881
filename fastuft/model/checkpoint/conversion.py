"""Differences between networks of the same shape, other than names: color channels, pixel scale, strides, epsilons."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from fastuft.model.backbone import IMAGENET_MEAN, IMAGENET_STD, Pool, Traits, Triple, as_triple
from fastuft.model.checkpoint.reading import Content
from fastuft.nested import lookup

Channels = Literal["auto", "rgb", "bgr", "gray"]

# detectron2's defaults (Caffe's pixels), which the configuration beside a checkpoint may change.
_DETECTRON2_MEAN = (103.53, 116.28, 123.675)
_DETECTRON2_STD = (1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The pixels that a checkpoint's first convolution was trained on.

    Args:
        channels: order of the colors; gray has one channel.
        scale: factor per channel, in the file's order, from this package's normalized pixels to the file's.
    """

    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    scale: Triple = (1.0, 1.0, 1.0)

    def converted(self, weight: Tensor) -> Tensor:
        """The first convolution [out, 3, h, w] that has the same result on RGB images as ``weight`` on its own pixels.

        Raises:
            ValueError: the weight has another number of channels.
        """
        expected = 1 if self.channels == "gray" else 3
        if weight.ndim != 4 or weight.shape[1] != expected:
            raise ValueError(
                f"init_channels={self.channels!r} needs a first convolution with {expected} "
                f"channel{'s' if expected > 1 else ''}, but the file's has shape {tuple(weight.shape)}"
            )
        if self.channels == "gray":
            return weight.expand(-1, 3, -1, -1) / 3  # the three channels of a gray image are equal
        scaled = weight * torch.tensor(self.scale).view(1, 3, 1, 1) if self.scale != (1.0, 1.0, 1.0) else weight
        return scaled.flip(1) if self.channels == "bgr" else scaled


def detectron2_settings(file: Path) -> tuple[Traits, Pixels]:
    """Strides and pixels of a detectron2 checkpoint, from the ``config.yaml`` beside it or from detectron2's defaults.

    Raises:
        ValueError: the settings cannot be converted.
    """
    import yaml

    beside = file.parent / "config.yaml"
    try:
        config = yaml.safe_load(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(beside)!r} is damaged; restore it or move it away") from error
    model = lookup(config, "MODEL")
    mean = as_triple(lookup(model, "PIXEL_MEAN") or list(_DETECTRON2_MEAN), f"{beside}: MODEL.PIXEL_MEAN")
    std = as_triple(lookup(model, "PIXEL_STD") or list(_DETECTRON2_STD), f"{beside}: MODEL.PIXEL_STD")
    channels: Literal["rgb", "bgr"] = "rgb" if lookup(config, "INPUT", "FORMAT") == "RGB" else "bgr"
    in_1x1 = lookup(model, "RESNETS", "STRIDE_IN_1X1")
    ours_mean, ours_std = (
        (IMAGENET_MEAN, IMAGENET_STD) if channels == "rgb" else (IMAGENET_MEAN[::-1], IMAGENET_STD[::-1])
    )
    if any(not math.isclose(255 * ours, theirs, abs_tol=0.01) for ours, theirs in zip(ours_mean, mean, strict=True)):
        raise ValueError(f"{str(beside)!r}: MODEL.PIXEL_MEAN={mean} is not ImageNet's, and only that can be converted")
    first, second, third = (255 * ours / theirs for ours, theirs in zip(ours_std, std, strict=True))
    return Traits(stride_in_1x1=in_1x1 is not False), Pixels(channels, (first, second, third))


def transformers_traits(settings: Mapping[str, Mapping[str, object]]) -> Traits:
    """The traits of a network, from ``config.json`` and ``preprocessor_config.json``."""
    config, preprocessor = settings.get("config", {}), settings.get("preprocessor", {})
    traits = Traits(stride_in_1x1=bool(config.get("downsample_in_bottleneck", False)))
    eps = config.get("layer_norm_eps")
    if isinstance(eps, float) and config.get("model_type") != "resnet":
        # ConvNeXt's blocks have their own epsilon; the setting applies to the last norm.
        pattern = "*head.norm" if config.get("model_type") == "convnext" else "*"
        traits = dataclasses.replace(traits, norm_eps=((pattern, eps),))
    if "image_mean" in preprocessor and "image_std" in preprocessor:
        mean = as_triple(preprocessor["image_mean"], "preprocessor_config.json: image_mean")
        std = as_triple(preprocessor["image_std"], "preprocessor_config.json: image_std")
        traits = dataclasses.replace(traits, mean=mean, std=std)
    return traits


def traits_from(saved: object) -> Traits:
    """Traits from the plain values in a checkpoint or an export of this package.

    Raises:
        ValueError: the values are damaged.
    """
    if not saved:
        return Traits()
    if not isinstance(saved, Mapping):
        raise ValueError(f"traits={saved!r} is not a mapping")
    given = {name: None if saved.get(name) is None else as_triple(saved[name], name) for name in ("mean", "std")}
    try:
        eps = tuple((str(pattern), float(value)) for pattern, value in saved.get("norm_eps", ()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"norm_eps={saved.get('norm_eps')!r} is not pairs of a pattern and a number") from error
    pool = saved.get("pool", "own")
    if pool not in get_args(Pool):
        raise ValueError(f"pool={pool!r} is not one of {', '.join(get_args(Pool))}")
    return Traits(given["mean"], given["std"], eps, bool(saved.get("stride_in_1x1", False)), pool)


def saved_traits(content: Content) -> Traits:
    """The traits that a checkpoint stores for its network."""
    if "config" in content.settings:
        return transformers_traits(content.settings)
    saved = content.settings.get("init_report", {}).get("traits") or {}
    pool = content.settings.get("model_config", {}).get("pool", "own")  # what the run chose, or found in its start
    return traits_from({**saved, "pool": pool} if pool != "own" else saved)
