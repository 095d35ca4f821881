"""timm's networks as backbones, with a stand-in for timm: its real ones are compared where timm is installed."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from fastuft.model import TimmBackbone, build_backbone, export_backbone, load_backbone


class ConvHead(nn.Module):
    """Like MobileNetV3: a layer behind the pooling widens the features."""

    num_features, head_hidden_size = 4, 6

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": [0.25, 0.25, 0.25], "input_size": (3, 64, 64)}
        self.stem, self.conv_head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 6)

    def forward(self, images):
        return self.conv_head(self.stem(images).mean((2, 3)))


class Plain(ConvHead):
    num_features, head_hidden_size = 6, None

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {}


class Unpooled(ConvHead):
    def forward(self, images):
        return self.stem(images)


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    networks = {"conv_head": ConvHead, "plain": Plain, "unpooled": Unpooled}
    stand_in = types.ModuleType("timm")
    stand_in.is_model = networks.__contains__
    stand_in.create_model = lambda name, pretrained, num_classes: networks[name]()
    monkeypatch.setitem(sys.modules, "timm", stand_in)


def test_the_width_is_that_of_the_features():
    backbone = build_backbone("timm:conv_head")
    assert backbone.num_features == 6 and backbone(torch.randn(2, 3, 8, 8)).shape == (2, 6)
    assert (backbone.arch, backbone.stem, backbone.input_size) == ("timm:conv_head", "imagenet", 64)
    assert (backbone.mean, backbone.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_what_timm_does_not_say_is_imagenets():
    backbone = build_backbone("timm:plain")
    assert (backbone.num_features, backbone.input_size, backbone.mean) == (6, 224, (0.485, 0.456, 0.406))


def test_networks_that_do_not_pool_are_said():
    with pytest.raises(ValueError, match=r"gives features of shape \(2, 4, 4, 4\), expected \(2, 6\)"):
        build_backbone("timm:unpooled")(torch.randn(2, 3, 8, 8))


def test_unknown_networks_and_stems_are_refused():
    with pytest.raises(ValueError, match="timm has no model 'nonsense'"):
        build_backbone("timm:nonsense")
    with pytest.raises(ValueError, match="is not available for timm networks"):
        build_backbone("timm:plain", "small")


def test_an_export_is_loaded_again(tmp_path):
    backbone = build_backbone("timm:conv_head").eval()
    export_backbone(backbone, tmp_path / "b.safetensors")
    again = load_backbone(tmp_path / "b.safetensors")
    images = torch.randn(2, 3, 8, 8)
    assert isinstance(again, TimmBackbone) and torch.equal(again(images), backbone(images))
