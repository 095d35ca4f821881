"""Backbones, MoCo's pair of encoders, BatchNorm modes, and loading and exporting checkpoints."""

from fastuft.model.backbone import Backbone, Stem, Traits
from fastuft.model.batchnorm import SplitBatchNorm2d, grouped_channels, has_batchnorm, set_batchnorm_mode
from fastuft.model.checkpoint import (
    Channels,
    InitReport,
    export,
    export_backbone,
    export_state_dict,
    load_backbone,
    load_init,
    named_network,
    open_backbone,
    traits_from,
)
from fastuft.model.grouped_batchnorm import BatchNorm, grouped_batch_norm
from fastuft.model.moco import Encoder, MoCo, ProjectionHead
from fastuft.model.networks import ARCHS, build_backbone
from fastuft.model.resnet import ResNet
from fastuft.model.resnet_v2 import ResNetV2
from fastuft.model.timm_network import TimmBackbone

__all__ = [
    "ARCHS",
    "Backbone",
    "BatchNorm",
    "Channels",
    "Encoder",
    "InitReport",
    "MoCo",
    "ProjectionHead",
    "ResNet",
    "ResNetV2",
    "SplitBatchNorm2d",
    "Stem",
    "TimmBackbone",
    "Traits",
    "build_backbone",
    "export",
    "export_backbone",
    "export_state_dict",
    "grouped_batch_norm",
    "grouped_channels",
    "has_batchnorm",
    "load_backbone",
    "load_init",
    "named_network",
    "open_backbone",
    "set_batchnorm_mode",
    "traits_from",
]
