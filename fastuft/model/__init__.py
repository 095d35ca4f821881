"""Backbones, the MoCo pair of encoders, BatchNorm modes, and checkpoints in and out."""

from fastuft.model.backbone import Backbone, Stem
from fastuft.model.batchnorm import SplitBatchNorm2d, has_batchnorm, set_batchnorm_mode
from fastuft.model.checkpoint import (
    InitReport,
    export,
    export_backbone,
    export_state_dict,
    load_backbone,
    load_init,
    read_checkpoint,
)
from fastuft.model.moco import Encoder, MoCo, ProjectionHead
from fastuft.model.networks import ARCHS, build_backbone
from fastuft.model.resnet import ResNet
from fastuft.model.resnet_v2 import ResNetV2
from fastuft.model.timm_network import TimmBackbone

__all__ = [
    "ARCHS",
    "Backbone",
    "Encoder",
    "InitReport",
    "MoCo",
    "ProjectionHead",
    "ResNet",
    "ResNetV2",
    "SplitBatchNorm2d",
    "Stem",
    "TimmBackbone",
    "build_backbone",
    "export",
    "export_backbone",
    "export_state_dict",
    "has_batchnorm",
    "load_backbone",
    "load_init",
    "read_checkpoint",
    "set_batchnorm_mode",
]
