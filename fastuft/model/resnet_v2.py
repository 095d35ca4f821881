"""ResNet-v2 backbones of Big Transfer (BiT): pre-activation, GroupNorm and weight-standardized convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastuft.model.backbone import Stem, Triple, default_input_size
from fastuft.model.residual import ResidualNetwork

HALF: Triple = (0.5, 0.5, 0.5)


class StdConv2d(nn.Conv2d):
    """Convolution whose kernel is standardized per output channel (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-10)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class PreActBottleneck(nn.Module):
    """Pre-activation bottleneck of ResNet-v2; the shortcut starts after the first activation."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, groups: int) -> None:
        super().__init__()
        outputs = planes * self.expansion
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
        y: Tensor = self.conv1(activated)
        y = self.conv2(F.relu(self.gn2(y), inplace=True))
        y = self.conv3(F.relu(self.gn3(y), inplace=True))
        return y + shortcut


class ResNetV2(ResidualNetwork):
    """BiT ResNet-v2 (Kolesnikov et al. 2020): GroupNorm and weight standardization, inputs (x - 0.5) / 0.5.

    Args:
        depths: blocks of each stage.
        widths: planes of each stage.
        stem: imagenet (7x7 stride 2, zero-padded max-pool) or small (3x3, no max-pool).
        groups: groups of each GroupNorm.
        small_stride: stride of the small stem.
        arch: its name.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        stem: Stem = "imagenet",
        groups: int = 32,
        small_stride: int = 1,
        arch: str = "resnetv2",
    ) -> None:
        super().__init__(
            arch,
            stem,
            num_features=widths[-1] * PreActBottleneck.expansion,
            mean=HALF,
            std=HALF,
            input_size=default_input_size(stem),
        )
        small = stem == "small"
        self.conv1 = StdConv2d(3, widths[0], *((3, small_stride, 1) if small else (7, 2, 3)), bias=False)
        # BiT pads with zeros before a max-pool without padding. No activation comes before it, so the values differ from
        # MaxPool2d(padding=1), which pads with -inf.
        self.maxpool = nn.Identity() if small else nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2))
        inputs = widths[0]
        self.num_stages = len(depths)
        for stage, (depth, planes) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(PreActBottleneck(inputs, planes, stride, groups))
                inputs = planes * PreActBottleneck.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.norm = nn.GroupNorm(groups, inputs)

    def features(self, images: Tensor) -> Tensor:
        x: Tensor = self.maxpool(self.conv1(images))
        for block in self.blocks():
            x = self.run_block(block, x)
        return F.relu(self.norm(x), inplace=True).mean(dim=(2, 3))
