"""Networks by name."""

from __future__ import annotations

from typing import Protocol

from fastuft.model.backbone import Backbone, Stem
from fastuft.model.resnet import BasicBlock, Bottleneck, ResNet
from fastuft.model.resnet_v2 import ResNetV2
from fastuft.model.timm_network import TimmBackbone


class _Builder(Protocol):
    def __call__(self, arch: str, stem: Stem) -> Backbone: ...


ARCHS: dict[str, _Builder] = {
    "resnet18": lambda arch, stem: ResNet(BasicBlock, (2, 2, 2, 2), stem=stem, arch=arch),
    "resnet34": lambda arch, stem: ResNet(BasicBlock, (3, 4, 6, 3), stem=stem, arch=arch),
    "resnet50": lambda arch, stem: ResNet(Bottleneck, (3, 4, 6, 3), stem=stem, arch=arch),
    "resnet101": lambda arch, stem: ResNet(Bottleneck, (3, 4, 23, 3), stem=stem, arch=arch),
    "resnet_tiny": lambda arch, stem: ResNet(BasicBlock, (1, 1, 1), (16, 32, 64), stem, small_stride=2, arch=arch),
    "bit_resnet50": lambda arch, stem: ResNetV2((3, 4, 6, 3), stem=stem, arch=arch),
    "bit_resnet101": lambda arch, stem: ResNetV2((3, 4, 23, 3), stem=stem, arch=arch),
    "bit_resnet_tiny": lambda arch, stem: ResNetV2((1, 1, 1), (16, 32, 64), stem, groups=8, small_stride=2, arch=arch),
}


def build_backbone(arch: str, stem: Stem = "imagenet", *, drop_path: float = 0.0) -> Backbone:
    """A randomly initialized backbone.

    Args:
        arch: a name in ``ARCHS``, or ``timm:NAME`` where timm is installed.
        stem: imagenet or small; timm networks bring their own and take imagenet only.
        drop_path: rate of stochastic depth in the last block, for timm networks that have it.

    Raises:
        ValueError: the network is unknown, timm is not installed, or the network has no stochastic depth.
    """
    if stem not in ("imagenet", "small"):
        raise ValueError(f"model.stem={stem!r} is not allowed; choose one of 'imagenet', 'small'")
    if arch.startswith("timm:"):
        if stem != "imagenet":
            raise ValueError(f"model.stem={stem!r} is not available for timm networks; leave it at 'imagenet'")
        return TimmBackbone(arch.removeprefix("timm:"), drop_path)
    if arch not in ARCHS:
        raise ValueError(f"model.arch={arch!r} is unknown; choose one of {', '.join(ARCHS)}, or timm:NAME")
    if drop_path:
        raise ValueError(f"model.drop_path={drop_path} is not available for {arch}; leave it at 0")
    return ARCHS[arch](arch, stem)
