"""Backbones, the MoCo pair of encoders, BatchNorm modes, and checkpoints in and out."""

from fastuft.model.batchnorm import SplitBatchNorm2d, has_batchnorm, set_batchnorm_mode
from fastuft.model.checkpoint import (
    BACKBONE_FILE,
    InitReport,
    export,
    export_backbone,
    export_state_dict,
    load_backbone,
    load_init,
    read_checkpoint,
)
from fastuft.model.moco import Encoder, MoCo, ProjectionHead
from fastuft.model.resnet import ARCHS, ResNet, ResNetV2, build_backbone

__all__ = [
    "ARCHS",
    "BACKBONE_FILE",
    "Encoder",
    "InitReport",
    "MoCo",
    "ProjectionHead",
    "ResNet",
    "ResNetV2",
    "SplitBatchNorm2d",
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
