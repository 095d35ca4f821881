"""Presets by family: which network gets which, what overrides them, and that a saved run has all values."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from fastuft.cli import configured, main
from fastuft.cli.commands import COMMANDS
from fastuft.config import ModelConfig, OptimConfig, family_of, preset_options
from fastuft.trainer.resolved import plain

NEEDED = {"target": "images", "out": "run", "init": "start.pth"}
VIT = {**NEEDED, "model": {"arch": "timm:vit_tiny_patch16_224"}}
PAPER = {**VIT, "recipe": "paper"}


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        ("resnet50", "resnet"),
        ("bit_resnet50", "resnet"),
        ("resnet_tiny", "resnet"),
        ("timm:resnet18", "resnet"),
        ("timm:efficientnet_lite0", "resnet"),
        ("timm:vit_small_patch14_dinov2", "vit"),
        ("timm:vit_small_patch16_dinov3", "vit"),
        ("timm:deit_tiny_patch16_224", "vit"),
        ("timm:swin_tiny_patch4_window7_224", "vit"),
        ("timm:convnext_atto", "convnext"),
        ("timm:convnextv2_atto", "convnext"),
        ("timm:test_convnext", "convnext"),
    ],
)
def test_the_preset_follows_the_architecture_name(arch, family):
    assert family_of(arch) == family


def test_the_resnet_preset_is_the_papers_recipe():
    assert preset_options("resnet", "resnet50", 200) == {}
    assert configured("finetune", {**NEEDED, "recipe": "paper"}).optim == OptimConfig()


def test_a_vit_gets_the_moco_v3_settings():
    config = configured("finetune", {**VIT, "optim": {"epochs": 50}})
    optim = config.optim
    assert (optim.preset, optim.optimizer, optim.lr, optim.scale_lr) == ("vit", "adamw", 1.5e-4, True)
    assert (optim.weight_decay, optim.decay_norms, optim.warmup_epochs) == (0.1, False, 5.0)
    assert config.model.freeze_patch
    left_open = configured("finetune", VIT).optim
    assert (left_open.lr, left_open.epochs, left_open.warmup_epochs) == (1.5e-4, "auto", "auto")
    other = configured("pretrain", {"target": "images", "out": "run", "model.arch": "timm:convnext_atto"})
    assert (other.optim.optimizer, other.optim.weight_decay, other.model.freeze_patch) == ("adamw", 0.05, False)
    assert other.data.batch_size == 2048  # pretraining's own, where the preset says nothing


def test_given_values_win(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim:\n  weight_decay: 0.2\n")
    config = configured("finetune", {**VIT, "config": str(file), "optim": {"lr": 0.001, "decay_norms": True}})
    assert (config.optim.lr, config.optim.weight_decay, config.optim.decay_norms) == (0.001, 0.2, True)
    assert config.optim.optimizer == "adamw"


def test_another_optimizer_has_its_own_values():
    assert configured("finetune", {**PAPER, "optim": {"optimizer": "sgd"}}).optim == OptimConfig()
    adamw = configured("finetune", {**NEEDED, "optim": {"optimizer": "adamw"}})
    assert (adamw.optim.lr, adamw.optim.layer_decay, adamw.model.freeze_patch) == (1.5e-4, 1.0, False)
    lars = configured("finetune", {**VIT, "optim": {"optimizer": "lars", "lr": 0.6}})
    assert (lars.optim.lr, lars.optim.weight_decay, lars.optim.momentum) == (0.6, 1e-6, 0.9)


def test_a_preset_is_chosen_by_name_or_none():
    for preset in ("none", "resnet"):
        assert configured("finetune", {**PAPER, "optim": {"preset": preset}}).optim == OptimConfig()
    named = configured("finetune", {**NEEDED, "optim": {"preset": "convnext"}})
    assert (named.optim.preset, named.optim.optimizer) == ("convnext", "adamw")
    with pytest.raises(ValueError, match=r"optim.preset=bert is not allowed; it takes one of auto, none, resnet"):
        configured("finetune", {**VIT, "optim": {"preset": "bert"}})


def test_a_saved_configuration_is_complete(monkeypatch, tmp_path):
    received = []
    fake = dataclasses.replace(COMMANDS["finetune"], run=lambda config: received.append(config) or 0)
    monkeypatch.setitem(COMMANDS, "finetune", fake)
    given = ["--target", "images", "--out", "run", "--init", "x", "--model.arch", "timm:vit_tiny_patch16_224"]
    assert main(["finetune", *given, "--optim.lr", "3e-4"]) == 0
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain(received[0])))
    assert main(["finetune", "--config", str(tmp_path / "config.yaml")]) == 0
    assert received[1] == received[0] and received[0].optim.lr == 3e-4


def test_a_printed_configuration_includes_the_presets_values(capsys, tmp_path, monkeypatch):
    given = ["finetune", "--target", "images", "--out", "run", "--init", "x", "--model.arch", "timm:convnext_atto"]
    with pytest.raises(SystemExit):
        main([*given, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["optim"]["optimizer"], printed["optim"]["weight_decay"]) == ("adamw", 0.05)


def test_a_null_group_is_refused_with_a_message(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("optim: null\n")
    given = ["--config", str(tmp_path / "c.yaml"), "--target", "a", "--out", "b", "--init", "c"]
    assert main(["finetune", *given]) == 2
    assert "optim=None is not allowed" in capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path):
    from fastuft.model import build_backbone, export_backbone

    export_backbone(build_backbone("resnet_tiny", "small"), tmp_path / "start.safetensors")
    return str(tmp_path / "start.safetensors")


@pytest.mark.parametrize("recipe", ["auto", "paper"])
def test_the_network_is_the_one_that_the_checkpoint_names(checkpoint, recipe):
    config = configured("finetune", {"target": "t", "out": "o", "init": checkpoint, "recipe": recipe})
    assert (config.model.arch, config.model.stem) == ("resnet_tiny", "small")


def test_a_network_that_is_given_wins_over_the_one_that_the_checkpoint_names(checkpoint):
    config = configured("finetune", {"target": "t", "out": "o", "init": checkpoint, "model.arch": "resnet18"})
    assert (config.model.arch, config.model.stem) == ("resnet18", "small")
    config = configured("finetune", {"target": "t", "out": "o", "init": checkpoint, "model.stem": "imagenet"})
    assert (config.model.arch, config.model.stem) == ("resnet_tiny", "imagenet")


@pytest.mark.parametrize("content", [None, b"not a checkpoint"])
def test_a_checkpoint_that_names_no_network_leaves_the_papers(tmp_path, content):
    file = tmp_path / "start.pth"
    if content is not None:
        file.write_bytes(content)
    config = configured("finetune", {"target": "t", "out": "o", "init": str(file)})
    assert (config.model.arch, config.model.stem) == ("resnet50", "imagenet")


def test_the_preset_follows_the_network_that_the_checkpoint_names(tmp_path):
    folder = tmp_path / "vit"
    folder.mkdir()
    fields = {
        "model_type": "vit",
        "hidden_size": 192,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
        "patch_size": 16,
    }
    (folder / "config.json").write_text(json.dumps({**fields, "image_size": 224, "intermediate_size": 768}))
    save_file({"embeddings.cls_token": torch.zeros(1, 1, 192)}, folder / "model.safetensors")
    config = configured("finetune", {"target": "t", "out": "o", "init": str(folder)})
    assert config.model.arch == "timm:vit_tiny_patch16_224" and config.optim.preset == "vit"


def test_the_network_is_never_left_open_in_a_run():
    with pytest.raises(ValueError, match=r"model\.arch='auto'"):
        ModelConfig(arch="auto")
    with pytest.raises(ValueError, match=r"model\.stem='auto'"):
        ModelConfig(stem="auto")
