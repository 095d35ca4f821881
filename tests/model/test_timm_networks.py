"""timm networks as backbones, with a stand-in for timm; real ones are compared if timm is installed."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from fastuft.config import OptimConfig
from fastuft.model import Encoder, MoCo, TimmBackbone, Traits, build_backbone, export_backbone, load_backbone, load_init
from fastuft.trainer.parameter_groups import parameter_groups


class ConvHead(nn.Module):
    """Like MobileNetV3: a layer after the pooling widens the features."""

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


class Tokens(nn.Module):
    """Like a ViT: a class token, a register and patch tokens; any size, stochastic depth, recomputation."""

    num_features, head_hidden_size, num_prefix_tokens, attn_pool = 5, None, 2, None
    recomputed = False

    def __init__(self, dynamic_img_size=False, drop_path_rate=0.0):
        super().__init__()
        self.pretrained_cfg, self.dynamic_img_size, self.drop_path_rate = {}, dynamic_img_size, drop_path_rate
        self.patch_embed = nn.Module()
        self.patch_embed.proj, self.patch_embed.patch_size = nn.Conv2d(3, 5, 4, 4), (4, 4)
        self.cls_token, self.fc_norm = nn.Parameter(torch.randn(1, 2, 5)), nn.LayerNorm(5)

    def forward_features(self, images):
        patches = self.patch_embed.proj(images).flatten(2).mT
        return torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1)

    def forward(self, images):
        return self.fc_norm(self.forward_features(images).mean(1))

    def no_weight_decay(self):
        return {"cls_token"}

    def set_grad_checkpointing(self, enable):
        self.recomputed = enable


class Unpooled(ConvHead):
    def forward(self, images):
        return self.stem(images)


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    networks = {"conv_head": ConvHead, "plain": Plain, "unpooled": Unpooled, "tokens": Tokens}
    stand_in = types.ModuleType("timm")
    stand_in.is_model = networks.__contains__
    stand_in.create_model = lambda name, pretrained, num_classes, **options: networks[name](**options)
    monkeypatch.setitem(sys.modules, "timm", stand_in)


def test_num_features_is_the_width_of_the_features():
    backbone = build_backbone("timm:conv_head")
    assert backbone.num_features == 6 and backbone(torch.randn(2, 3, 8, 8)).shape == (2, 6)
    assert (backbone.arch, backbone.stem, backbone.input_size) == ("timm:conv_head", "imagenet", 64)
    assert (backbone.mean, backbone.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_missing_timm_preprocessing_falls_back_to_imagenet():
    backbone = build_backbone("timm:plain")
    assert (backbone.num_features, backbone.input_size, backbone.mean) == (6, 224, (0.485, 0.456, 0.406))


def test_unpooled_features_are_refused():
    with pytest.raises(ValueError, match=r"returns features of shape \(2, 4, 4, 4\), expected \(2, 6\)"):
        build_backbone("timm:unpooled")(torch.randn(2, 3, 8, 8))


def test_unknown_networks_and_stems_are_refused():
    with pytest.raises(ValueError, match="timm has no model 'nonsense'"):
        build_backbone("timm:nonsense")
    with pytest.raises(ValueError, match="is not available for timm networks"):
        build_backbone("timm:plain", "small")


def test_an_export_loads_again(tmp_path):
    backbone = build_backbone("timm:conv_head").eval()
    export_backbone(backbone, tmp_path / "b.safetensors")
    again = load_backbone(tmp_path / "b.safetensors")
    images = torch.randn(2, 3, 8, 8)
    assert isinstance(again, TimmBackbone) and torch.equal(again(images), backbone(images))


def test_vits_take_any_multiple_of_the_patch_size():
    backbone = build_backbone("timm:tokens", drop_path=0.2)
    assert (backbone.network.dynamic_img_size, backbone.network.drop_path_rate) == (True, 0.2)
    assert backbone(torch.randn(2, 3, 8, 12)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"size=10: timm:tokens .* multiple of its patch's, 4 pixels; choose 8 or 12"):
        backbone(torch.randn(2, 3, 8, 10))
    with pytest.raises(ValueError, match=r"augment.size=3: .* choose 4 or 8"):
        backbone.check_size(3, "augment.size")


def test_networks_without_stochastic_depth_or_patches_are_refused():
    with pytest.raises(ValueError, match=r"model.drop_path=0.2 is not available for timm:plain"):
        build_backbone("timm:plain", drop_path=0.2)
    backbone = build_backbone("timm:plain")
    backbone.check_size(33, "augment.size")
    assert backbone.patch_projection() == [] and backbone.undecayed() == ()
    with pytest.raises(ValueError, match="checkpoint_activations=True is not available for timm:plain"):
        backbone.checkpoint_activations()
    with pytest.raises(ValueError, match=r"optim.layer_decay: the order of the layers of timm:plain is not known"):
        backbone.layers()
    with pytest.raises(ValueError, match=r"model.pool='mean' is for ViTs that pool by their tokens"):
        backbone.adopt(Traits(pool="mean"))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_pooling_precedes_the_last_norm_and_is_exported(tmp_path, pool):
    backbone = build_backbone("timm:tokens").eval()
    images = torch.randn(2, 3, 8, 8)
    tokens = backbone.network.forward_features(images)
    backbone.adopt(Traits(pool=pool))
    pooled = tokens[:, 0] if pool == "cls" else tokens[:, 2:].mean(1)
    torch.testing.assert_close(backbone(images), backbone.network.fc_norm(pooled))
    export_backbone(backbone, tmp_path / "b.safetensors")
    again = load_backbone(tmp_path / "b.safetensors")
    assert again.traits.pool == pool and torch.equal(again(images), backbone(images))


def test_tokens_have_no_weight_decay_and_activations_can_be_recomputed():
    encoder = Encoder(build_backbone("timm:tokens"), 4)
    groups = parameter_groups(encoder, OptimConfig(decay_norms=False))
    decays = {id(parameter): "weight_decay" not in group for group in groups for parameter in group["params"]}
    network = encoder.backbone.network
    assert decays[id(network.patch_embed.proj.weight)] and not decays[id(network.cls_token)]
    encoder.backbone.checkpoint_activations()
    assert network.recomputed and encoder.backbone.recompute
    assert encoder.backbone.patch_projection() == list(network.patch_embed.proj.parameters())


def test_a_run_checkpoint_includes_its_head(tmp_path):
    moco, other = (MoCo(build_backbone("timm:plain"), 4) for _ in range(2))
    torch.save({"model": moco.state_dict()}, tmp_path / "x.pt")
    report = load_init(other, tmp_path / "x.pt")
    assert report.head_loaded and report.others == ("model.key_encoder.backbone.network",)
    assert all(map(torch.equal, moco.query_encoder.state_dict().values(), other.query_encoder.state_dict().values()))
