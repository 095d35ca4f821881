"""Layouts of ResNets and of BiT's ResNet-v2; backbone names are torchvision's."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from fastuft.model.checkpoint.layout import Layout, renamed

OWN_NAMES = Layout("the network's own", lambda name: (name,))

# nn.Sequential(*resnet.children()), as in lightly's examples.
SEQUENTIAL = Layout(
    "sequential",
    renamed(
        [
            (r"conv1\.(.+)", r"0.\1"),
            (r"bn1\.(.+)", r"1.\1"),
            *((rf"layer{stage}\.(.+)", rf"{stage + 3}.\1") for stage in (1, 2, 3, 4)),
        ]
    ),
)


def _stage(offset: int) -> Sequence[tuple[str, int]]:
    return [(str(stage), stage + offset) for stage in (1, 2, 3, 4)]


TIMM_V2 = Layout(
    "timm ResNet-v2",
    renamed(
        [
            (r"conv1\.(.+)", r"stem.conv.\1"),
            (r"norm\.(.+)", r"norm.\1"),
            *(
                (rf"layer{stage}\.(\d+)\.gn(\d)\.(.+)", rf"stages.{new}.blocks.\1.norm\2.\3")
                for stage, new in _stage(-1)
            ),
            *(
                (rf"layer{stage}\.(\d+)\.downsample\.(.+)", rf"stages.{new}.blocks.\1.downsample.conv.\2")
                for stage, new in _stage(-1)
            ),
            *((rf"layer{stage}\.(.+?)\.(.+)", rf"stages.{new}.blocks.\1.\2") for stage, new in _stage(-1)),
        ]
    ),
)


def _bit_names(name: str) -> tuple[str, ...]:
    """The names in BiT's published NumPy archives, after their leading ``resnet/``."""
    if name == "conv1.weight":
        return ("root_block/standardized_conv2d/kernel",)
    kind = "gamma" if name.endswith("weight") else "beta"
    if name.startswith("norm."):
        return (f"group_norm/{kind}",)
    match = re.fullmatch(r"layer(\d)\.(\d+)\.(conv|gn|downsample)(\d?)\.(weight|bias)", name)
    if match is None:
        return ()
    unit = f"block{match[1]}/unit{int(match[2]) + 1:02d}"
    if match[3] == "downsample":
        return (f"{unit}/a/proj/standardized_conv2d/kernel",)
    part = f"{unit}/{'abc'[int(match[4]) - 1]}"
    return (f"{part}/standardized_conv2d/kernel" if match[3] == "conv" else f"{part}/group_norm/{kind}",)


def _from_tensorflow(name: str, parts: Sequence[Tensor]) -> Tensor:
    """TensorFlow's kernels are HWIO; torch's are OIHW."""
    (tensor,) = parts
    return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor


BIT_NUMPY = Layout("BiT npz", _bit_names, _from_tensorflow)

DETECTRON2 = Layout(
    "detectron2 ResNet",
    renamed(
        [
            (r"conv1\.(.+)", r"stem.conv1.\1"),
            (r"bn1\.(.+)", r"stem.conv1.norm.\1"),
            *((rf"layer{stage}\.(\d+)\.bn(\d)\.(.+)", rf"res{new}.\1.conv\2.norm.\3") for stage, new in _stage(1)),
            *((rf"layer{stage}\.(\d+)\.downsample\.0\.(.+)", rf"res{new}.\1.shortcut.\2") for stage, new in _stage(1)),
            *(
                (rf"layer{stage}\.(\d+)\.downsample\.1\.(.+)", rf"res{new}.\1.shortcut.norm.\2")
                for stage, new in _stage(1)
            ),
            *((rf"layer{stage}\.(\d+)\.(conv\d\..+)", rf"res{new}.\1.\2") for stage, new in _stage(1)),
        ]
    ),
)


def _transformers_resnet(name: str) -> tuple[str, ...]:
    match = re.fullmatch(r"(conv1|bn1)\.(.+)", name)
    if match:
        kind = "convolution" if match[1] == "conv1" else "normalization"
        return (f"embedder.embedder.{kind}.{match[2]}",)
    match = re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(.+)", name)
    if match is None:
        return ()
    block = f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}"
    index = int(match[4])
    if match[3] == "downsample.":
        return (f"{block}.shortcut.{('convolution', 'normalization')[index]}.{match[5]}",)
    kind = "convolution" if match[3] == "conv" else "normalization"
    return (f"{block}.layer.{index - 1}.{kind}.{match[5]}",)


TRANSFORMERS_RESNET = Layout("transformers ResNet", _transformers_resnet)

RESNET_LAYOUTS = (OWN_NAMES, SEQUENTIAL, TIMM_V2, BIT_NUMPY, DETECTRON2, TRANSFORMERS_RESNET)
