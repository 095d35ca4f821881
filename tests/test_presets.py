"""Presets by family: which network gets which, what overrides them, and that a saved run has all values."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from fastuft.cli import configured, main
from fastuft.cli.commands import COMMANDS
from fastuft.config import OptimConfig, family_of, preset_options
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
