"""Whole runs: what they write, report and refuse."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("filelock")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")

from run_results import assert_same_state, final, rows

from fastuft.cli import main
from fastuft.model import Traits, build_backbone, export_backbone, load_backbone
from fastuft.runfolder import RunFolder
from fastuft.trainer import Callbacks, train
from fastuft.trainer import run as run_module

yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.filterwarnings("ignore:method.queue_size")


def test_a_run_writes_its_folder(tiny, folders):
    config = tiny(runtime={"tensorboard": True, "keep_last": 1})
    result = train(config)
    folder = result.run_dir
    assert result.finished and result.interrupted is None and result.steps == 8
    assert yaml.safe_load((folder / "config.yaml").read_text())["method"]["queue_size"] == 64
    assert len(rows(folder)) == 8 and result.metrics["step"] == 8
    for row in rows(folder):
        assert row["loss"] == pytest.approx(row["loss_q"] + row["loss_m"], rel=1e-6)
        assert row["loss_q"] == pytest.approx(row["loss_alignment"] + row["loss_distribution"], rel=1e-5)
    assert [step for step, _ in RunFolder(folder).checkpoints.all()] == [8]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 8 and summary["images"] == 128 and summary["bn"] == "split"
    assert summary["manifest"]["num_target"] == 40 and summary["manifest"]["num_source"] == 24
    assert list((folder / "tensorboard").iterdir())
    weights = load_backbone(folder).state_dict()
    state = final(folder)["model"]
    assert all(torch.equal(value, state[f"query_encoder.backbone.{name}"]) for name, value in weights.items())


def test_the_saved_configuration_repeats_the_run(tiny, tmp_path):
    first = train(tiny(max_steps=3)).run_dir
    assert main(["pretrain", "--config", str(first / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert rows(first) == rows(tmp_path / "again")
    assert_same_state(final(first), final(tmp_path / "again"))


def test_the_saved_configuration_has_chosen_and_given_values(tiny):
    folder = RunFolder(train(tiny(max_steps=1, runtime={"device": "auto"}, data={"threads": 0})).run_dir)
    config, given = folder.read_config(), folder.read_given()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert config["runtime"]["device"] == device and given["runtime"]["device"] == "auto"
    assert config["runtime"]["precision"] == {"cpu": "fp32", "cuda": "bf16"}[device]
    assert given["runtime"]["precision"] == "auto"
    assert (config["model"]["bn"], given["model"]["bn"]) == ("split", "auto")
    assert config["data"]["threads"] >= 1 and given["data"]["threads"] == 0
    assert config.pop("init_channels") == "auto"  # of no checkpoint
    assert "auto" not in json.dumps(config)


def test_without_a_terminal_progress_is_plain_lines(tiny, capsys):
    train(tiny(max_steps=2))
    assert "step 2/2" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_gpu_run_synchronizes_only_when_it_writes(tiny, monkeypatch, precision):
    """The loop between two rows of metrics, including the loader's batches and the learning rate."""
    pytest.importorskip("nvidia.dali")
    real, calls = run_module.train_step, []

    def watched(learner, batch, mark, **options):
        figures = real(learner, batch, mark, **options)
        calls.append(0)
        # Kernels compile in the first steps; the eighth is followed by a row and a checkpoint, which do wait.
        torch.cuda.set_sync_debug_mode("error" if 3 <= len(calls) < 8 else "default")
        return figures

    monkeypatch.setattr(run_module, "train_step", watched)
    runtime = {"device": "cuda", "precision": precision, "log_every": 50, "save_every": 8}
    try:
        assert train(tiny(runtime=runtime, data={"loader": "dali", "batch_size": 8}, optim={"epochs": 1})).finished
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"batch_size": 256}}, "data.batch_size=256 needs 256 images"),
        ({"model": {"bn_group": 12}}, "model.bn_group=12 does not divide the batch of one device, 16"),
        ({"data": {"drop_last": False}}, "drop_last=False"),
        ({"model": {"bn": "sync"}}, "needs several CUDA devices"),
        ({"model": {"bn": "shuffle"}}, "exchanges images between processes, but there is only one"),
        ({"optim": {"optimizer": "apex_fused_sgd"}}, "unrelated web toolkit"),
        ({"model": {"pool": "cls"}}, "model.pool='cls' is for ViTs, and resnet_tiny has no tokens"),
        ({"model": {"drop_path": 0.1}}, "model.drop_path=0.1 is not available for resnet_tiny"),
        ({"model": {"freeze_patch": True}}, "resnet_tiny projects no patches to tokens"),
        ({"resume": "nowhere.pt"}, "'nowhere.pt' is not a file"),
    ],
)
def test_impossible_settings_are_refused(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(**changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_refused(tiny):
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        train(tiny(runtime={"device": "cuda"}))


def test_callbacks_follow_the_run_step_by_step(tiny):
    steps, epochs = [], []
    callbacks = Callbacks(
        on_step=lambda progress: steps.append((progress.epoch, progress.step, progress.images)),
        on_epoch=lambda progress, row: epochs.append((progress.epoch, progress.step, row["step"])),
    )
    train(tiny(max_steps=6), callbacks)
    assert steps == [(0, 1, 16), (0, 2, 32), (0, 3, 48), (0, 4, 64), (1, 1, 80), (1, 2, 96)]
    assert epochs == [(1, 0, 4)]


def test_initialization_is_reported(tiny, tmp_path):
    start = train(tiny(out=str(tmp_path / "start"), max_steps=1)).run_dir
    folder = train(tiny(init=str(start / "backbone.safetensors"), max_steps=1, resume="auto")).run_dir
    assert RunFolder(folder).read_config()["init_channels"] == "rgb"
    train(tiny(init=str(start / "backbone.safetensors"), max_steps=2, resume="auto"))
    report = json.loads((folder / "summary.json").read_text())["init"]
    assert report["matched"] and not report["head_loaded"]


def test_traits_of_the_initial_network_persist_in_the_run_and_its_exports(tiny, tmp_path):
    start = build_backbone("resnet_tiny", "small")
    start.adopt(Traits(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    export_backbone(start, tmp_path / "start.safetensors")
    config = tiny(init=str(tmp_path / "start.safetensors"), optim={"epochs": 1}, resume="auto")
    whole = train(dataclasses.replace(config, out=str(tmp_path / "whole"))).run_dir
    train(dataclasses.replace(config, max_steps=1))
    resumed = train(config).run_dir
    assert_same_state(final(whole), final(resumed))
    for folder in (whole, resumed):
        assert load_backbone(folder).mean == (0.1, 0.2, 0.3)
        (folder / "backbone.safetensors").unlink()
        assert load_backbone(folder).std == (0.4, 0.5, 0.6)


def test_prefilling_a_large_queue_reports_progress(tiny, monkeypatch, capsys):
    monkeypatch.setattr("fastuft.trainer.prefill._SAY_EVERY", 0.0)
    train(tiny(max_steps=1, method={"queue_size": 64}))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("filling the queue")]
    assert [line.split(",")[0] for line in said] == [f"filling the queue: {n} of 64 keys" for n in (16, 32, 48)]
    assert all(re.search(r", \d+\.\d min left$", line) for line in said)


def test_a_queue_larger_than_the_training_set_warns(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"method\.queue_size=65 exceeds the 64 training images"):
            train(tiny(method={"queue_size": 65}))
