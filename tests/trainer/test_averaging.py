"""The average with the start: looks, evaluations and exports use it, and training does not."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from run_results import rows, same_weights

from fastuft.model import load_backbone
from fastuft.runfolder import RunFolder
from fastuft.trainer import Callbacks, StartAverage, train

pytestmark = pytest.mark.filterwarnings("ignore:method.queue_size")


def weights(file):
    return load_backbone(file).state_dict()


def assert_averaged(exported, trained, start, share):
    trained, start = weights(trained), weights(start)
    for name, value in weights(exported).items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (1 - share) * trained[name] + share * start[name], msg=name)
        else:
            assert torch.equal(value, trained[name]), name


@pytest.mark.parametrize("bn", ["plain", "split", "frozen"])
def test_the_exported_weights_are_the_average(tiny, start, bn):
    run = train(tiny(init=start, start_share=0.25, model={"bn": bn}, verdict={"looks": 0})).run_dir
    folder = RunFolder(run)
    trained, before = weights(folder.checkpoints.path(8)), weights(start)
    assert any(not torch.equal(trained[name], before[name]) for name in trained)
    assert_averaged(folder.backbone_file, folder.checkpoints.path(8), start, 0.25)


def test_the_selected_look_and_the_last_step_are_averaged(tiny, start):
    result = train(tiny(init=start, start_share=0.5, select="judged", verdict={"looks": 4}, runtime={"keep_last": 9}))
    folder = RunFolder(result.run_dir)
    assert_averaged(folder.last_file, folder.checkpoints.path(8), start, 0.5)
    (judged,) = folder.judged_files()
    step = next(step for step in (2, 4, 6, 8) if folder.judged_file(step) == judged)
    assert_averaged(judged, folder.checkpoints.path(step), start, 0.5)
    said = folder.read_summary()["verdict"]
    assert said["start_share"] == 0.5
    assert ("averaged with 50 % of the start's" in said["line"]) == (said["exported"] != "start")


def test_looks_and_watched_figures_use_the_average(tiny, start, folders):
    watch = {"train": folders[0], "test": folders[0], "source": folders[1], "every_epochs": 1}
    run = train(tiny(init=start, start_share=1.0, watch=watch, verdict={"looks": 2})).run_dir
    looks = rows(run, "look")
    assert [row["step"] for row in looks] == [0, 4, 8]
    assert [row["neighbors_kept"] for row in looks] == [1.0, 1.0, 1.0]
    watched = [{k: v for k, v in row.items() if k not in ("step", "epoch")} for row in rows(run, "watch")]
    assert len(watched) == 3 and watched[0] == watched[1] == watched[2]
    folder = RunFolder(run)
    assert_averaged(folder.backbone_file, folder.checkpoints.path(8), start, 1.0)


def test_training_does_not_depend_on_the_share(tiny, start, tmp_path):
    averaged = train(tiny(init=start, start_share=0.5, verdict={"looks": 4})).run_dir
    plain = train(tiny(init=start, verdict={"looks": 4}, out=str(tmp_path / "plain"))).run_dir
    assert rows(averaged) == rows(plain)
    assert same_weights(*(RunFolder(run).checkpoints.path(8) for run in (averaged, plain)))


def test_a_resumed_run_exports_the_same_average(tiny, start, tmp_path):
    def stop(progress):
        if progress.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    config = {"init": start, "start_share": 0.3, "verdict": {"looks": 0}}
    whole = train(tiny(**config, out=str(tmp_path / "whole"))).run_dir
    assert train(tiny(**config), Callbacks(on_step=stop)).interrupted == "SIGTERM"
    resumed = train(tiny(**config, resume="auto")).run_dir
    assert same_weights(*(RunFolder(run).backbone_file for run in (whole, resumed)))


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_a_run_without_its_start_names_the_remedy(tiny, start, content):
    config = {"init": start, "verdict": {"looks": 0}}
    folder = RunFolder(train(tiny(**config, start_share=0.3, max_steps=4)).run_dir)
    folder.start_file.unlink()
    if content is not None:
        folder.start_file.write_bytes(content)
    with pytest.raises(ValueError, match=r"start_share=0\.3: the start, .* resume with start_share 0"):
        train(tiny(**config, start_share=0.3, resume="auto"))
    assert train(tiny(**config, start_share=0.0, resume="auto")).finished
    assert_averaged(folder.backbone_file, folder.checkpoints.path(8), start, 0.0)


def test_a_share_without_a_start_is_refused(tiny):
    with pytest.raises(ValueError, match=r"start_share=0\.2: without init there is no start"):
        tiny(start_share=0.2)


def test_a_share_of_zero_returns_the_backbone(start):
    backbone = load_backbone(start)
    assert StartAverage(0.0, {}).of(backbone) is backbone


def test_averaging_does_not_change_the_trained_backbone(start):
    backbone = load_backbone(start)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    zeros = {name: torch.zeros_like(value) for name, value in before.items()}
    averaged = StartAverage(0.5, zeros).of(backbone).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(torch.equal(averaged[n], v * 0.5) for n, v in before.items() if v.is_floating_point())
