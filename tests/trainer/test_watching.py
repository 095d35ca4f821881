"""Evaluation during training."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("filelock")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")

from run_results import assert_same_state, final, rows

from fastuft.trainer import run as run_module
from fastuft.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore:method.queue_size")


def test_watching_constant_features_omits_undefined_figures(tiny, folders):
    class Collapsed(torch.nn.Module):
        mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, images):
            return self.weight.expand(len(images), 4)

    watch = {"train": folders[0], "test": folders[0], "source": folders[1], "every_epochs": 1}
    assert run_module.watch.evaluate(Collapsed(), tiny(watch=watch), torch.device("cpu")) == {}


@pytest.mark.parametrize(
    ("watch", "reason"),
    [
        ({"train": "class0", "test": ""}, r"watch\.train='.*' has only one class folder \('one'\)"),
        ({"source": "class0"}, r"watch\.source='.*' has only one class folder"),
        ({"train": "", "test": "class0"}, r"test has class folders that train lacks: 'one'"),
        ({"train": "", "test": "class0/one"}, "has no class folders"),
    ],
)
def test_images_that_cannot_be_watched_are_refused_first(tiny, folders, tmp_path, watch, reason):
    shutil.copytree(Path(folders[0]) / "class0", tmp_path / "class0" / "one")
    watched = {name: str(tmp_path / below) if below else folders[0] for name, below in watch.items()}
    with pytest.raises(ValueError, match=reason):
        train(tiny(watch={**watched, "every_epochs": 1}))
    assert not (tmp_path / "run").exists()


def test_watched_images_use_the_classes_of_the_gallery(tiny, folders, tmp_path):
    for name in ("class0", "class2"):
        shutil.copytree(Path(folders[0]) / name, tmp_path / "test" / name)
    watched = run_module.watch.folders(
        tiny(watch={"train": folders[0], "test": str(tmp_path / "test"), "every_epochs": 1})
    )
    assert set(watched["test"].labels) == {0, 2} and watched["test"].classes == ["class0", "class1", "class2"]


def test_watching_is_recorded_and_does_not_change_training(tiny, folders, tmp_path):
    target, source = folders
    plain = train(tiny(out=str(tmp_path / "plain"))).run_dir
    watch = {"train": target, "test": target, "source": source, "every_epochs": 1}
    watched = train(tiny(watch=watch)).run_dir
    assert_same_state(final(plain), final(watched))
    found = rows(watched, "watch")
    assert [row["step"] for row in found] == [0, 4, 8]
    assert all(0 <= row[name] <= 1 for row in found for name in ("retrieval", "source_clustering"))


def test_an_interrupted_evaluation_is_repeated_on_resume(tiny, folders, monkeypatch):
    config = tiny(watch={"source": folders[1], "every_epochs": 1})
    real, calls = run_module.watch.evaluate, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(run_module.watch, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    train(dataclasses.replace(config, resume="auto"))
    assert [row["step"] for row in rows(Path(config.out), "watch")] == [0, 4, 8]
