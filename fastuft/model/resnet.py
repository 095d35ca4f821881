"""ResNet and ResNet-v2 (BiT) backbones without classifier.

ResNet's state-dict keys are torchvision's (without ``fc``), so official checkpoints load by name. ResNet-v2 follows Big
Transfer: pre-activation bottlenecks, GroupNorm and weight-standardized convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Stem = Literal["imagenet", "small"]
Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions and a shortcut (ResNet v1.5)."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv1x1(inputs, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


class ResNet(nn.Module):
    """Stem, residual stages and global average pooling.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks of each stage; stages after the first halve the resolution.
        widths: planes of each stage.
        stem: imagenet (7x7 stride 2, 3x3 max-pool) or small (3x3, no max-pool).
        small_stride: stride of the small stem.

    Attributes:
        num_features: width of the pooled features.
        mean, std: normalization of the inputs, for pixels in [0, 1].
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        stem: Stem = "imagenet",
        small_stride: int = 1,
    ) -> None:
        super().__init__()
        small = stem == "small"
        self.conv1 = conv3x3(3, widths[0], small_stride) if small else nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        inputs = widths[0]
        self.num_stages = len(depths)
        for stage, (depth, planes) in enumerate(zip(depths, widths, strict=True)):
            blocks: list[nn.Module] = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                outputs = planes * block.expansion
                downsample = None
                if stride != 1 or inputs != outputs:
                    downsample = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
                blocks.append(block(inputs, planes, stride, downsample))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.num_features = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [B, num_features] of normalized images [B, 3, H, W]."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for stage in range(self.num_stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x.mean(dim=(2, 3))


class StdConv2d(nn.Conv2d):
    """Convolution whose kernel is standardized per output channel (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-10)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class PreActBottleneck(nn.Module):
    """Pre-activation bottleneck of ResNet-v2; the shortcut starts behind the first activation."""

    def __init__(self, inputs: int, planes: int, stride: int, groups: int) -> None:
        super().__init__()
        outputs = planes * 4
        self.gn1 = nn.GroupNorm(groups, inputs)
        self.conv1 = StdConv2d(inputs, planes, 1, bias=False)
        self.gn2 = nn.GroupNorm(groups, planes)
        self.conv2 = StdConv2d(planes, planes, 3, stride, 1, bias=False)
        self.gn3 = nn.GroupNorm(groups, planes)
        self.conv3 = StdConv2d(planes, outputs, 1, bias=False)
        project = stride != 1 or inputs != outputs
        self.downsample = StdConv2d(inputs, outputs, 1, stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.gn1(x), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(activated)
        y = self.conv1(activated)
        y = self.conv2(F.relu(self.gn2(y), inplace=True))
        return self.conv3(F.relu(self.gn3(y), inplace=True)) + shortcut


class ResNetV2(nn.Module):
    """BiT ResNet-v2 (Kolesnikov et al. 2020): GroupNorm and weight standardization, inputs (x - 0.5) / 0.5.

    Args:
        depths: blocks of each stage.
        widths: planes of each stage.
        stem: imagenet (7x7 stride 2, zero-padded max-pool) or small (3x3, no max-pool).
        groups: groups of each GroupNorm.
        small_stride: stride of the small stem.

    Attributes:
        num_features: width of the pooled features.
        mean, std: normalization of the inputs, for pixels in [0, 1].
    """

    mean = HALF
    std = HALF

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        stem: Stem = "imagenet",
        groups: int = 32,
        small_stride: int = 1,
    ) -> None:
        super().__init__()
        small = stem == "small"
        self.conv1 = StdConv2d(3, widths[0], *((3, small_stride, 1) if small else (7, 2, 3)), bias=False)
        # BiT pads with zeros before a max-pool without padding; behind no activation, so the values differ from
        # MaxPool2d(padding=1), which pads with -inf.
        self.maxpool = nn.Identity() if small else nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2))
        inputs = widths[0]
        self.num_stages = len(depths)
        for stage, (depth, planes) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(PreActBottleneck(inputs, planes, stride, groups))
                inputs = planes * 4
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.norm = nn.GroupNorm(groups, inputs)
        self.num_features = inputs

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [B, num_features] of normalized images [B, 3, H, W]."""
        x = self.maxpool(self.conv1(images))
        for stage in range(self.num_stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return F.relu(self.norm(x), inplace=True).mean(dim=(2, 3))


ARCHS: dict[str, Callable[[Stem], ResNet | ResNetV2]] = {
    "resnet18": lambda stem: ResNet(BasicBlock, (2, 2, 2, 2), stem=stem),
    "resnet34": lambda stem: ResNet(BasicBlock, (3, 4, 6, 3), stem=stem),
    "resnet50": lambda stem: ResNet(Bottleneck, (3, 4, 6, 3), stem=stem),
    "resnet101": lambda stem: ResNet(Bottleneck, (3, 4, 23, 3), stem=stem),
    "resnet_tiny": lambda stem: ResNet(BasicBlock, (1, 1, 1), (16, 32, 64), stem=stem, small_stride=2),
    "bit_resnet50": lambda stem: ResNetV2((3, 4, 6, 3), stem=stem),
    "bit_resnet101": lambda stem: ResNetV2((3, 4, 23, 3), stem=stem),
    "bit_resnet_tiny": lambda stem: ResNetV2((1, 1, 1), (16, 32, 64), stem=stem, groups=8, small_stride=2),
}


class TimmBackbone(nn.Module):
    """Any timm network without its classifier; state-dict keys are timm's own."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import timm

        network = timm.create_model(name, pretrained=False, num_classes=0)
        self.num_features = int(network.num_features)
        self.mean: Triple = tuple(network.default_cfg.get("mean", IMAGENET_MEAN))
        self.std: Triple = tuple(network.default_cfg.get("std", IMAGENET_STD))
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [B, num_features] of normalized images [B, 3, H, W]."""
        return self.network(images)


def build_backbone(arch: str, stem: Stem = "imagenet") -> nn.Module:
    """A randomly initialized backbone.

    Args:
        arch: a name in ``ARCHS``, or ``timm:NAME`` where timm is installed.
        stem: imagenet or small; timm networks bring their own and take imagenet only.

    Returns:
        A module [B, 3, H, W] -> [B, num_features] with ``num_features``, ``mean`` and ``std``.

    Raises:
        ValueError: unknown network, or timm asked for where it is missing.
    """
    if stem not in ("imagenet", "small"):
        raise ValueError(f"model.stem={stem!r} is not allowed; choose one of 'imagenet', 'small'")
    if arch.startswith("timm:"):
        name = arch.removeprefix("timm:")
        try:
            import timm
        except ImportError as error:
            raise ValueError(
                f"model.arch={arch!r} needs timm; pip install timm, or choose {', '.join(ARCHS)}"
            ) from error
        if not timm.is_model(name):
            raise ValueError(f"model.arch={arch!r}: timm has no model {name!r}; timm.list_models() names them")
        if stem != "imagenet":
            raise ValueError(f"model.stem={stem!r} is not available for timm networks; leave it at 'imagenet'")
        return TimmBackbone(name)
    if arch not in ARCHS:
        raise ValueError(f"model.arch={arch!r} is unknown; choose one of {', '.join(ARCHS)}, or timm:NAME")
    return ARCHS[arch](stem)
