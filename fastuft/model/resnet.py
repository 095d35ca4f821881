"""ResNet backbones with torchvision's state-dict keys (without ``fc``), so official checkpoints load by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from fastuft.model.backbone import IMAGENET_MEAN, IMAGENET_STD, Stem, Traits, default_input_size
from fastuft.model.batchnorm import norm_relu
from fastuft.model.residual import ResidualNetwork


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
        x = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(x), shortcut)


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
        x = norm_relu(self.bn1, self.conv1(x))
        x = norm_relu(self.bn2, self.conv2(x))
        return norm_relu(self.bn3, self.conv3(x), shortcut)


class ResNet(ResidualNetwork):
    """Stem, residual stages and global average pooling.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks of each stage; stages after the first halve the resolution.
        widths: planes of each stage.
        stem: imagenet (7x7 stride 2, 3x3 max-pool) or small (3x3, no max-pool).
        small_stride: stride of the small stem.
        arch: its name.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        stem: Stem = "imagenet",
        small_stride: int = 1,
        arch: str = "resnet",
    ) -> None:
        super().__init__(
            arch,
            stem,
            num_features=widths[-1] * block.expansion,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            input_size=default_input_size(stem),
        )
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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def adopt(self, traits: Traits) -> None:
        changed = traits.stride_in_1x1 != self.traits.stride_in_1x1
        super().adopt(replace(traits, stride_in_1x1=False))
        if changed:
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
        self.traits = traits

    def features(self, images: Tensor) -> Tensor:
        x: Tensor = self.maxpool(norm_relu(self.bn1, self.conv1(images)))
        for block in self.blocks():
            x = self.run_block(block, x)
        return x.mean(dim=(2, 3))
