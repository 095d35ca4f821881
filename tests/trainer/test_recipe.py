"""The recipe chooses open options for the images and the machine, and keeps given ones."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastuft.api import finetune
from fastuft.cli import configured
from fastuft.config import AUTO_OPTIONS, TrainConfig, is_auto
from fastuft.data import Manifest
from fastuft.runfolder import RunFolder
from fastuft.trainer import recipe, train
from fastuft.trainer.distributed import Ranks
from fastuft.trainer.recipe import settle
from fastuft.trainer.schedule import base_lr

CPU = Ranks(0, 1, torch.device("cpu"))
GPU = SimpleNamespace(device=torch.device("cuda"), world_size=1, rank=0)
GPUS = SimpleNamespace(device=torch.device("cuda"), world_size=8, rank=0)


def images(target, source=0, total=None):
    paths = tuple(f"{index}.jpg" for index in range(target + source))
    return Manifest(paths, target, source if total is None else total, 0.5, 0, "")


def left_open(**options):
    return configured("finetune", {"target": "t", "out": "o", "init": "i", "augment": {"size": 96}, **options})


def settled(manifest, ranks=CPU, **options):
    config, choices = settle(left_open(**options), manifest, ranks)
    return config, {choice.option: choice for choice in choices}


def value(config, option):
    group, _, name = option.rpartition(".")
    return getattr(getattr(config, group) if group else config, name)


def test_the_measured_settings_are_chosen():
    """The settings of the table in docs/recipes.md for 900 target and 500 source images."""
    config, _ = settled(images(900, 500))
    assert (config.data.batch_size, config.method.queue_size, config.model.bn) == (64, 1024, "plain")
    assert (config.optim.epochs, config.optim.lr, config.method.key_momentum) == (40, 0.03, 0.995)


@pytest.mark.parametrize("ranks", [CPU, GPU, GPUS])
@pytest.mark.parametrize("manifest", [images(12), images(50), images(500), images(900, 500), images(50_000, 50_000)])
def test_choices_are_consistent(manifest, ranks):
    config, choices = settled(manifest, ranks)
    assert not [option for option in AUTO_OPTIONS if is_auto(value(config, option))]
    batch, union = config.data.batch_size, len(manifest)
    assert 2 * ranks.world_size <= batch or union < 2 * ranks.world_size
    assert batch % ranks.world_size == 0
    if union >= 2 * batch:
        assert config.method.queue_size <= union - batch
    assert 1 <= config.optim.epochs <= 200
    assert config.optim.lr == pytest.approx(0.03 * batch / 64, rel=1e-2)
    assert 0.98 <= config.method.key_momentum <= 0.999
    assert all(choice.reason for choice in choices.values())


def test_longer_runs_get_higher_key_momentum_and_larger_queues():
    small, large = (settled(images(count), GPU)[0] for count in (500, 200_000))
    assert small.method.queue_size < large.method.queue_size == 65536
    assert small.data.batch_size < large.data.batch_size == 256
    assert large.method.key_momentum == pytest.approx(0.999, abs=1e-3)


def test_given_values_are_kept_and_the_others_follow():
    given = {"optim": {"lr": 0.015, "epochs": 3}, "data": {"batch_size": 256}, "method": {"queue_size": 65536}}
    config, choices = settled(images(900, 500), **given)
    assert (config.optim.lr, config.optim.epochs, config.data.batch_size) == (0.015, 3, 256)
    assert config.method.queue_size == 65536
    assert not {"optim.lr", "optim.epochs", "data.batch_size", "method.queue_size"} & set(choices)
    assert config.method.key_momentum == 0.98  # 15 steps


def test_a_run_limited_by_max_steps_makes_the_same_choices():
    assert settled(images(900, 500), max_steps=2)[0].method.key_momentum == 0.995


def test_the_verdict_selects_when_it_can_be_drawn():
    assert settled(images(900))[0].select == "judged"
    assert settled(images(900), verdict={"looks": 0})[0].select == "last"
    assert settled(images(900), select="last")[0].select == "last"


def test_recipe_paper_has_the_papers_values():
    config = left_open(recipe="paper", augment={"size": "auto"})
    assert config == TrainConfig(target="t", out="o", init="i")
    assert settle(config, images(900, 500), CPU) == (config, [])


def test_views_are_not_larger_than_the_images(tmp_path):
    for side, wanted in ((128, 96), (40, 32), (600, 224)):
        path = tmp_path / f"{side}.png"
        Image.fromarray(np.zeros((side, side + 10, 3), np.uint8)).save(path)
        manifest = dataclasses.replace(images(1), paths=(str(path),))
        config, _ = settle(left_open(augment={"size": "auto"}, model={"arch": "resnet18"}), manifest, CPU)
        assert config.augment.size == wanted


def test_images_that_are_refused_do_not_choose_the_size(tmp_path):
    path = tmp_path / "small.png"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(path)
    manifest = dataclasses.replace(images(1), paths=(str(path),))
    for limit, wanted in ((0.0021, 32), (0.0019, 224)):
        open_options = {"augment": {"size": "auto"}, "model": {"arch": "resnet18"}, "data": {"max_megapixels": limit}}
        config, _ = settle(left_open(**open_options), manifest, CPU)
        assert config.augment.size == wanted


def test_a_network_with_a_fixed_input_size_keeps_it(tmp_path, monkeypatch):
    class Fixed(torch.nn.Module):
        input_size, patch = 224, None

        def forward(self, images):
            assert images.shape[-1] == 224, "wrong size"
            return images

    monkeypatch.setattr(recipe, "build_backbone", lambda arch, stem: Fixed())
    path = tmp_path / "small.png"
    Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(path)
    config, choices = settle(
        left_open(augment={"size": "auto"}), dataclasses.replace(images(1), paths=(str(path),)), CPU
    )
    assert config.augment.size == 224 and "takes no other" in choices[0].reason


def test_auto_replays_as_many_source_images_as_target_images(folders):
    target, source = folders  # 40 and 48
    manifest = Manifest.build(target, source, fraction=None)
    assert (manifest.num_target, manifest.num_source) == (40, 40)
    again = Manifest.build(target, source, fraction=manifest.fraction)
    assert again.paths == manifest.paths
    assert Manifest.build(source, target, fraction=None).fraction == 1.0


def test_a_few_images_in_one_flat_folder_train(folders, start, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(Path(folders[0]).rglob("*.png"))[:12]):
        shutil.copy(path, flat / f"{number}.png")
    model, quick = {"arch": "resnet_tiny", "stem": "small", "head_dim": 8}, {"epochs": 2}
    run = finetune(target=flat, init=start, out=tmp_path / "run", model=model, optim=quick, runtime={"device": "cpu"})
    said = capsys.readouterr().out
    assert run.finished and run.steps == 2
    assert "data.batch_size 8 " in said and "12 target images are few" in said
    assert "not known whether it is better" in said and "12 images are too few to tell" in said


def test_a_run_prints_and_saves_its_choices(folders, start, tmp_path, capsys):
    options = {
        "model": {"arch": "resnet_tiny", "stem": "small", "head_dim": 16},
        "runtime": {"device": "cpu", "tensorboard": False},
        "data": {"threads": 1, "loader": "torch"},
        "optim": {"epochs": 2},
        "verdict": {"looks": 0},
    }
    out = tmp_path / "run"
    finetune(target=folders[0], source=folders[1], init=start, out=out, **options)
    said = capsys.readouterr().out
    assert "Chosen for 40 target and 40 source images on a CPU" in said
    assert (
        "data.batch_size 8 " in said
        and "10 steps per epoch of 80 images" in said
        and "method.queue_size 64 " in said
        and "optim.epochs" not in said
    )
    folder = RunFolder(out)
    summary = json.loads((out / "summary.json").read_text())
    chosen = {choice["option"]: choice["value"] for choice in summary["recipe"]["chosen"]}
    saved = folder.read_config()
    assert chosen["data.batch_size"] == saved["data"]["batch_size"] == 8
    assert folder.read_given()["data"]["batch_size"] == "auto"
    # The saved configuration leaves nothing open, and gives the same weights.
    again = tmp_path / "again"
    finetune(target=folders[0], source=folders[1], init=start, out=again, config=str(out / "config.yaml"))
    assert "Chosen for" not in capsys.readouterr().out
    weights, repeated = (load_file(run / "backbone.safetensors") for run in (out, again))
    assert all(torch.equal(repeated[name], value) for name, value in weights.items())


def test_a_resumed_run_keeps_its_choices(tiny, start, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(tiny(init=start, max_steps=2), recipe="auto")
    config = recipe._replaced(config, {"method.queue_size": "auto", "optim.lr": "auto"})
    train(config)
    first = RunFolder(tmp_path / "run").read_summary()["recipe"]
    monkeypatch.setattr(recipe, "_RATE", 1.0)
    monkeypatch.setattr(recipe, "_LARGEST_QUEUE", 8)
    capsys.readouterr()
    train(dataclasses.replace(config, max_steps=None, resume="auto"))
    assert "Chosen for" not in capsys.readouterr().out
    saved = RunFolder(tmp_path / "run").read_config()
    assert (saved["optim"]["lr"], saved["method"]["queue_size"]) == (0.0075, 32)
    assert RunFolder(tmp_path / "run").read_summary()["recipe"] == first
    assert {choice["option"] for choice in first["chosen"]} == {"method.queue_size", "optim.lr", "model.bn"}


@pytest.mark.parametrize("preset", ["none", "auto"])  # without and with optim.scale_lr
def test_other_optimizers_get_their_own_rates(preset):
    optim = {"preset": preset, "optimizer": "adamw", "lr": "auto", "warmup_epochs": "auto"}
    config, _ = settled(images(400, 100), optim=optim)
    batch = config.data.batch_size
    assert base_lr(config.optim, batch) == pytest.approx(1.5e-4 * batch / 256, rel=1e-2) and batch < 256
    assert config.optim.warmup_epochs == pytest.approx(config.optim.epochs / 10)
