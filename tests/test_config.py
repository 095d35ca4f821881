"""The configuration refuses impossible values by name and survives a round trip through YAML's types."""

from __future__ import annotations

import dataclasses
import json
import re
import typing

import pytest

from fastuft.config import (
    AugmentConfig,
    ClusteringConfig,
    DataConfig,
    EvalConfig,
    FewShotConfig,
    MapConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    Positive,
    Range,
    RuntimeConfig,
    SemiConfig,
    TrainConfig,
    VerdictConfig,
    WatchConfig,
    as_paths,
    check_values,
)

EVALUATION_GROUPS = (FewShotConfig, SemiConfig, ClusteringConfig, MapConfig)
GROUPS = (ModelConfig, MethodConfig, AugmentConfig, DataConfig, OptimConfig, RuntimeConfig, VerdictConfig, WatchConfig)


def test_defaults_are_the_papers_finetuning_recipe():
    config = TrainConfig(target="t", out="o")
    assert (config.optim.lr, config.data.batch_size, config.optim.epochs) == (0.015, 256, 200)
    assert (config.method.queue_size, config.method.temperature, config.method.key_momentum) == (65536, 0.2, 0.999)
    assert config.data.replay_fraction == 0.1 and config.method.mix == "cutmix" and config.method.alpha == 1.0


@pytest.mark.parametrize("config", [TrainConfig, EvalConfig, *GROUPS, *EVALUATION_GROUPS])
def test_frozen_with_every_field_documented(config):
    required = {
        f.name: "x" for f in dataclasses.fields(config) if f.default is f.default_factory is dataclasses.MISSING
    }
    made = config(**required)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.new = 1
    for field in dataclasses.fields(config):
        assert f"        {field.name}: " in config.__doc__, field.name


@pytest.mark.parametrize(
    ("config", "values", "words"),
    [
        (ModelConfig, {"stem": "big"}, ["model.stem='big'", "'imagenet', 'small'"]),
        (ModelConfig, {"bn": "global"}, ["model.bn='global'", "'split'"]),
        (ModelConfig, {"head_dim": 0}, ["model.head_dim=0"]),
        (ModelConfig, {"bn_group": 1}, ["model.bn_group=1", "[2, inf]"]),
        (MethodConfig, {"temperature": 0.0}, ["method.temperature=0.0", "(0, inf]"]),
        (MethodConfig, {"temperature": float("nan")}, ["method.temperature=nan"]),
        (MethodConfig, {"queue_size": 0}, ["method.queue_size=0"]),
        (MethodConfig, {"key_momentum": 1.5}, ["method.key_momentum=1.5", "[0, 1]"]),
        (MethodConfig, {"mix": "blend"}, ["method.mix='blend'", "'mixup'"]),
        (MethodConfig, {"mix_per": "image"}, ["method.mix_per='image'"]),
        (MethodConfig, {"mix_weight": -1.0}, ["method.mix_weight=-1.0"]),
        (MethodConfig, {"alpha": 0.0}, ["method.alpha=0.0"]),
        (MethodConfig, {"mix": "none", "mix_only": True}, ["method.mix_only", "cutmix or mixup"]),
        (AugmentConfig, {"size": 4}, ["augment.size=4"]),
        (AugmentConfig, {"flip_p": 1.1}, ["augment.flip_p=1.1"]),
        (AugmentConfig, {"hue": 0.6}, ["augment.hue=0.6", "[0, 0.5]"]),
        (AugmentConfig, {"crop_scale": (0.5, 0.2)}, ["augment.crop_scale[0]=0.5"]),
        (AugmentConfig, {"crop_scale": (0.5, 1.2)}, ["augment.crop_scale[1]=1.2"]),
        (AugmentConfig, {"rotation": -1.0}, ["augment.rotation=-1.0"]),
        (DataConfig, {"batch_size": 1}, ["data.batch_size=1"]),
        (DataConfig, {"replay_fraction": 1.5}, ["data.replay_fraction=1.5"]),
        (DataConfig, {"replay_mode": "all"}, ["data.replay_mode='all'", "'balanced'"]),
        (DataConfig, {"loader": "ffcv"}, ["data.loader='ffcv'", "'dali'"]),
        (DataConfig, {"on_bad_file": "ignore"}, ["data.on_bad_file='ignore'"]),
        (DataConfig, {"prefetch": 0}, ["data.prefetch=0"]),
        (OptimConfig, {"lr": 0.0}, ["optim.lr=0.0"]),
        (OptimConfig, {"epochs": 0}, ["optim.epochs=0"]),
        (OptimConfig, {"schedule": "step"}, ["optim.schedule='step'", "'cosine'"]),
        (OptimConfig, {"optimizer": "adam"}, ["optim.optimizer='adam'", "'sgd'"]),
        (RuntimeConfig, {"device": "tpu"}, ["runtime.device='tpu'", "'cpu'"]),
        (RuntimeConfig, {"precision": "fp8"}, ["runtime.precision='fp8'"]),
        (RuntimeConfig, {"log_every": 0}, ["runtime.log_every=0"]),
        (RuntimeConfig, {"keep_last": 0}, ["runtime.keep_last=0"]),
        (OptimConfig, {"epochs": 3, "warmup_epochs": 4.0}, ["optim.warmup_epochs=4.0", "[0, 3]", "optim.epochs"]),
        (FewShotConfig, {"crop_scale": (0.5, 0.2)}, ["fewshot.crop_scale[0]=0.5"]),
        (FewShotConfig, {"lr": 0.0}, ["fewshot.lr=0.0"]),
        (SemiConfig, {"shots": [2, 0]}, ["semi.shots=0"]),
        (ClusteringConfig, {"restarts": 0}, ["clustering.restarts=0"]),
        (MapConfig, {"points": -1}, ["map.points=-1"]),
        (WatchConfig, {"every_epochs": 2}, ["watch.every_epochs=2", "watch.train"]),
    ],
)
def test_impossible_values(config, values, words):
    with pytest.raises(ValueError) as error:
        config(**values)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"target": []}, ["target", "folder"]),
        ({"target": ""}, ["target=''", "empty path", "'.'"]),
        ({"source": ["a", " "]}, ["source=['a', ' ']", "empty path"]),
        ({"out": ""}, ["out=''", "empty path"]),
        ({"allow_missing": ["fc.*"]}, ["allow_missing=['fc.*']", "init"]),
        ({"select": "judged"}, ["select='judged'", "init", "verdict.looks"]),
        ({"max_steps": 0}, ["max_steps=0"]),
        ({"data": DataConfig(replay_mode="balanced")}, ["data.replay_mode", "source"]),
        ({"model": ModelConfig(bn="split"), "data": DataConfig(drop_last=False)}, ["model.bn", "data.drop_last"]),
    ],
)
def test_impossible_combinations(values, words):
    with pytest.raises(ValueError) as error:
        TrainConfig(**{"target": "t", "out": "o"} | values)
    assert all(word in str(error.value) for word in words), error.value


def test_evaluation_values():
    with pytest.raises(ValueError, match=r"fewshot\.shots=0"):
        FewShotConfig(shots=[0])
    with pytest.raises(ValueError, match="stem='big'"):
        EvalConfig(checkpoint="c", train="t", stem="big")
    with pytest.raises(ValueError, match="out='' contains an empty path"):
        EvalConfig(checkpoint="c", train="t", out="")
    with pytest.raises(ValueError, match="loader='ffcv'"):
        EvalConfig(checkpoint="c", train="t", loader="ffcv")
    with pytest.raises(ValueError, match="precision='fp16'"):
        EvalConfig(checkpoint="c", train="t", precision="fp16")


def test_allowed_values_come_from_the_annotations():
    @dataclasses.dataclass
    class Options:
        layers: list[typing.Annotated[int, Range(1)]]
        kinds: list[typing.Literal["a", "b"]]
        limit: Positive | None = None

    check_values(Options([1, 2], ["a"]), "group")
    for values, word in (
        (([1, 0], []), "group.layers=0 is out of range; allowed: [1, inf]"),
        (([], ["c"]), "group.kinds='c' is not allowed; choose one of 'a', 'b'"),
        (([], [], 0.0), "group.limit=0.0 is out of range; allowed: (0, inf]"),
    ):
        with pytest.raises(ValueError, match=re.escape(word)):
            check_values(Options(*values), "group")


def test_path_objects_are_accepted():
    assert as_paths(None) == () and as_paths("a") == ("a",) and as_paths(["a", "b"]) == ("a", "b")


def test_the_tree_is_plain_data():
    config = TrainConfig(target=["a", "b"], out="o", data=DataConfig(replay_cache="c"))
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    assert content["augment"]["crop_scale"] == [0.2, 1.0] and content["init"] is None
    assert set(content) == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("name", ["warmup_epochs", "head_warmup_epochs"])
def test_warmup_is_within_the_epochs(name):
    with pytest.raises(ValueError, match=rf"optim.{name}=3.0 is out of range; allowed: \[0, 2\]"):
        OptimConfig(epochs=2, **{name: 3.0})
