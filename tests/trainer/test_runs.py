"""Whole runs: what they write, what they refuse, and that a stopped one goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("filelock")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")

from processes import run as run_command
from processes import write_config
from run_rows import rows

from fastuft.cli import main
from fastuft.data import TrainStream
from fastuft.model import Traits, build_backbone, export_backbone, load_backbone
from fastuft.runfolder import FolderInUseError, FolderLostError, RunFolder, load_checkpoint, read_json
from fastuft.trainer import Callbacks, CheckpointError, NonFiniteLossError, saving, train
from fastuft.trainer import run as run_module

yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.filterwarnings("ignore:method.queue_size")


def final(folder):
    return load_checkpoint(RunFolder(folder).checkpoints.all()[0][1])


def assert_same_state(left, right):
    for part in ("model", "queue", "optimizer", "scaler", "rank_buffers", "torch_rng"):
        torch.testing.assert_close(left[part], right[part], rtol=0, atol=0, equal_nan=True)
    assert all(left[name] == right[name] for name in ("epoch", "step", "global_step", "images"))


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


@pytest.mark.parametrize("first", [{}, {"bn": "split"}], ids=["chosen, then named", "named, then chosen"])
def test_giving_a_chosen_value_is_not_a_changed_setting(tiny, first):
    train(tiny(max_steps=1, model=first))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the run continues with settings that have changed")
        train(tiny(max_steps=2, resume="auto", model={} if first else {"bn": "split"}))
    with pytest.warns(UserWarning, match=r"model\.bn 'split' -> 'plain'"):
        train(tiny(max_steps=3, resume="auto", model={"bn": "plain"}))


def test_without_a_terminal_progress_is_plain_lines(tiny, capsys):
    train(tiny(max_steps=2))
    assert "step 2/2" in capsys.readouterr().out


def assert_parts_equal(whole, stops, tiny, tmp_path, changes):
    """A run that is stopped after each of ``stops`` steps and goes on ends as the uninterrupted one."""
    for stop in (*stops, None):
        result = train(tiny(out=str(tmp_path / "parts"), resume="auto", max_steps=stop, **changes))
    assert result.finished
    assert rows(whole) == rows(tmp_path / "parts")
    assert_same_state(final(whole), final(tmp_path / "parts"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"mix": "none"}, "model": {"bn": "plain"}},
        {"method": {"mix": "mixup", "mix_only": True, "mix_per": "pair"}, "optim": {"clip_grad": 1.0}},
        {"data": {"replay_mode": "balanced", "loader": "dali"}},
        {"runtime": {"precision": "bf16"}, "method": {"queue_prefill": False}},
        {"runtime": {"precision": "fp16"}},
        {"optim": {"optimizer": "adamw", "lr": 1e-3, "decay_norms": False, "layer_decay": 0.8, "clip_grad": 1.0}},
        {"optim": {"optimizer": "adamw", "lr": 1e-3}, "runtime": {"precision": "fp16", "checkpoint_activations": True}},
        {"method": {"queue_dtype": "fp8"}},
    ],
    ids=[
        "default",
        "plain",
        "mixup-only",
        "balanced-dali",
        "bf16",
        "fp16",
        "adamw-layers",
        "adamw-fp16-recomputed",
        "fp8-queue",
    ],
)
def test_a_stopped_run_resumes_bit_exactly(tiny, tmp_path, changes):
    if changes.get("data", {}).get("loader") == "dali":
        pytest.importorskip("nvidia.dali")
    whole = train(tiny(out=str(tmp_path / "whole"), **changes)).run_dir
    steps = final(whole)["global_step"]
    assert_parts_equal(whole, (1, steps // 2 + 1), tiny, tmp_path, changes)  # within the first epoch, within the second


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_stopped_gpu_run_resumes_bit_exactly(tiny, tmp_path, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    # ResNet-18 with its max-pool: every kernel of a user's network must have a reproducible form.
    changes = {
        "runtime": {"device": "cuda", "deterministic": True},
        "model": {"arch": "resnet18", "stem": "imagenet"},
        "data": {"loader": loader},
    }
    whole = train(tiny(out=str(tmp_path / "whole"), **changes)).run_dir
    assert_parts_equal(whole, (1, 5), tiny, tmp_path, changes)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_gpu_run_synchronizes_only_when_it_writes(tiny, monkeypatch, precision):
    """The loop between two rows of metrics, the loader's hand-over and the learning rate included."""
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


def test_resuming_a_finished_run_changes_nothing(tiny):
    config = tiny(resume="auto", optim={"epochs": 1})
    before = train(config)
    after = train(config)
    assert after.finished and after.steps == before.steps == 4
    assert after.metrics == before.metrics
    assert len(rows(after.run_dir)) == 4


def test_resume_takes_a_checkpoint(tiny, tmp_path):
    config = tiny(runtime={"save_every": 1, "keep_last": 9}, optim={"epochs": 1})
    folder = train(config).run_dir
    path = str(folder / "checkpoints" / "step_00000002.pt")
    with pytest.raises(ValueError, match=r"is older than .*step_0000000"):
        train(dataclasses.replace(config, resume=path))
    other = train(dataclasses.replace(config, resume=path, out=str(tmp_path / "other")))
    assert_same_state(final(folder), final(other.run_dir))


def test_a_folder_with_a_run_is_refused(tiny):
    train(tiny(max_steps=1))
    with pytest.raises(ValueError, match=r"already has a run; continue it with resume=auto"):
        train(tiny(max_steps=1))


def test_rows_of_a_start_without_a_checkpoint_are_replaced(tiny):
    config = tiny(max_steps=2, resume="auto")
    (folder := train(config).run_dir / "checkpoints").rename(folder.with_name("lost"))
    folder.with_name("backbone.safetensors").unlink()
    train(config)
    assert [row["step"] for row in rows(folder.parent)] == [1, 2]


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


@pytest.mark.parametrize(
    ("section", "change"),
    [("method", {"queue_size": 32}), ("data", {"batch_size": 8}), ("optim", {"optimizer": "adamw"})],
)
def test_a_resumed_run_refuses_a_changed_shape(tiny, section, change):
    train(tiny(max_steps=1))
    with pytest.raises(ValueError, match=f"{section}.{next(iter(change))} was .* in the checkpoint"):
        train(tiny(resume="auto", **{section: change}))


def test_changed_images_are_refused_and_changed_settings_reported(tiny, folders):
    train(tiny(max_steps=1))
    with pytest.raises(ValueError, match="content_hash was"):
        train(tiny(resume="auto", source=None))
    with pytest.warns(UserWarning, match=r"optim.lr 0.05 -> 0.01"):
        train(tiny(max_steps=2, resume="auto", optim={"lr": 0.01}))


def test_changed_optimizer_settings_apply_after_resuming(tiny, monkeypatch):
    train(tiny(max_steps=1, optim={"momentum": 0.0}))
    seen = []

    def looked(learner, batch, mark, **options):
        seen.append({name: learner.optimizer.param_groups[0][name] for name in ("momentum", "weight_decay")})
        return real(learner, batch, mark, **options)

    real = run_module.train_step
    monkeypatch.setattr(run_module, "train_step", looked)
    with pytest.warns(UserWarning, match=r"optim.momentum 0.0 -> 0.5"):
        train(tiny(max_steps=3, resume="auto", optim={"momentum": 0.5, "weight_decay": 1e-3}))
    assert seen == [{"momentum": 0.5, "weight_decay": 1e-3}] * 2


def test_a_non_finite_loss_stops_the_run_before_a_checkpoint(tiny, monkeypatch):
    real = run_module.train_step

    def broken(learner, batch, mark, **options):
        figures = real(learner, batch, mark, **options)
        return figures * torch.nan if (batch.epoch, batch.step) == (1, 1) else figures

    monkeypatch.setattr(run_module, "train_step", broken)
    config = tiny(runtime={"log_every": 3})
    with pytest.raises(NonFiniteLossError, match=r"at step 6 on rank 0; the last good .*step_00000004\.pt"):
        train(config)
    monkeypatch.undo()
    assert train(dataclasses.replace(config, resume="auto")).finished


def test_non_finite_weights_are_not_saved(tiny, monkeypatch):
    real = run_module.train_step

    def broken(learner, batch, mark, **options):
        figures = real(learner, batch, mark, **options)
        if (batch.epoch, batch.step) == (1, 3):  # the loss before the update was fine
            next(learner.moco.parameters()).data.fill_(torch.inf)
        return figures

    monkeypatch.setattr(run_module, "train_step", broken)
    with pytest.raises(NonFiniteLossError, match=r"weights are not finite after step 8 .*step_00000004\.pt"):
        train(tiny())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_within_the_step_and_stops(tiny, tmp_path, monkeypatch, number):
    whole = train(tiny(out=str(tmp_path / "whole"))).run_dir
    real = run_module.train_step

    def interrupted(learner, batch, mark, **options):
        if (batch.epoch, batch.step) == (1, 1):
            os.kill(os.getpid(), number)
        return real(learner, batch, mark, **options)

    caught = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    if (
        signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    ):  # as nohup leaves it for the whole suite; a run keeps that choice
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    handlers = [signal.getsignal(n) for n in caught]
    monkeypatch.setattr(run_module, "train_step", interrupted)
    result = train(tiny())
    assert (result.interrupted, result.steps, result.finished) == (signal.Signals(number).name, 6, False)
    assert handlers == [signal.getsignal(n) for n in caught]
    stopped = read_json(RunFolder(result.run_dir).stopped_file)
    assert stopped == {"signal": signal.Signals(number).name, "step": 6, "epoch": 1}
    monkeypatch.undo()
    train(tiny(resume="auto"))
    assert_same_state(final(whole), final(result.run_dir))
    assert not RunFolder(result.run_dir).stopped_file.exists()


def test_a_signal_during_prefill_stops_the_run(tiny, monkeypatch):
    monkeypatch.setattr(TrainStream, "prefill", prefill_with_signal(TrainStream.prefill))
    result = train(tiny())
    assert (result.interrupted, result.steps) == ("SIGTERM", 0)


def prefill_with_signal(real):
    def prefill(self, count):
        for views in real(self, count):
            os.kill(os.getpid(), signal.SIGTERM)
            yield views

    return prefill


@pytest.mark.parametrize(("launcher", "status"), [(None, 85), ("run7", 0)], ids=["plain", "torchelastic"])
def test_a_deliberate_stop_has_the_status_that_the_launcher_expects(
    tiny, tmp_path, monkeypatch, capsys, launcher, status
):
    arguments = write_config(tiny(), tmp_path / "config.yaml")
    monkeypatch.setattr(TrainStream, "prefill", prefill_with_signal(TrainStream.prefill))
    if launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launcher)
    assert main(arguments) == status
    assert "before anything was saved; start it again" in capsys.readouterr().err
    monkeypatch.undo()
    assert read_json(RunFolder(tmp_path / "run").stopped_file)["step"] == 0
    assert main(arguments) == 0  # nothing was saved, so nothing blocks the folder


def test_a_run_that_failed_before_its_first_checkpoint_frees_its_folder(tiny, monkeypatch):
    monkeypatch.setattr(run_module, "train_step", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny(max_steps=1))
    monkeypatch.undo()
    assert train(tiny(max_steps=1)).steps == 1


@pytest.mark.parametrize("left", ["backbone.safetensors", "last.safetensors", "judged_00000008.safetensors"])
def test_weights_without_a_checkpoint_are_not_overwritten(tiny, left):
    folder = RunFolder(train(tiny(max_steps=1)).run_dir)
    for file in (*folder.checkpoints.folder.iterdir(), folder.metrics_file):
        file.unlink()
    folder.backbone_file.rename(folder.path / left)
    content = (folder.path / left).read_bytes()
    for resume, reason in (
        ("auto", "has an exported backbone but no checkpoint to continue from"),
        ("no", "already has a run"),
    ):
        with pytest.raises(ValueError, match=reason):
            train(tiny(max_steps=1, resume=resume))
    assert (folder.path / left).read_bytes() == content and not folder.metrics_file.exists()


def test_a_run_does_not_resume_in_the_folder_of_another(tiny, tmp_path):
    one = RunFolder(train(tiny(max_steps=1)).run_dir)
    other = RunFolder(train(tiny(max_steps=2, out=str(tmp_path / "other"))).run_dir)
    content = one.metrics_file.read_bytes()
    with pytest.raises(ValueError, match=r"resume='.*step_00000002\.pt' is none of the checkpoints in out='.*run'"):
        train(tiny(resume=str(other.checkpoints.path(2))))
    assert one.metrics_file.read_bytes() == content and not one.checkpoints.path(2).exists()
    assert train(tiny(resume=os.path.relpath(one.checkpoints.path(1)), max_steps=2)).steps == 2


def test_a_folder_in_use_by_another_run_is_refused(tiny):
    config = tiny(max_steps=1)
    folder = RunFolder(Path(config.out))
    with folder.lock(), pytest.raises(FolderInUseError, match=r"out='.*run' is in use by another run of this process"):
        train(config)
    assert not folder.path.exists()
    assert train(config).steps == 1


def test_a_run_folder_removed_during_training_is_reported(tiny, monkeypatch):
    config = tiny()
    real = run_module.train_step

    def removed(learner, batch, mark, **options):
        if batch.step == 1:
            shutil.rmtree(config.out)
        return real(learner, batch, mark, **options)

    monkeypatch.setattr(run_module, "train_step", removed)
    with pytest.raises(FolderLostError, match=r"out='.*run' was removed or replaced while the run worked in it"):
        train(config)
    assert not Path(config.out).exists()


def test_callbacks_follow_the_run_step_by_step(tiny):
    steps, epochs = [], []
    callbacks = Callbacks(
        on_step=lambda progress: steps.append((progress.epoch, progress.step, progress.images)),
        on_epoch=lambda progress, row: epochs.append((progress.epoch, progress.step, row["step"])),
    )
    train(tiny(max_steps=6), callbacks)
    assert steps == [(0, 1, 16), (0, 2, 32), (0, 3, 48), (0, 4, 64), (1, 1, 80), (1, 2, 96)]
    assert epochs == [(1, 0, 4)]


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
    places = {name: str(tmp_path / place) if place else folders[0] for name, place in watch.items()}
    with pytest.raises(ValueError, match=reason):
        train(tiny(watch={**places, "every_epochs": 1}))
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


def test_restarted_ranks_resume_whatever_the_resume_option_says(tiny, tmp_path, monkeypatch):
    elsewhere = train(tiny(out=str(tmp_path / "elsewhere"), max_steps=1)).run_dir
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    path = str(RunFolder(elsewhere).checkpoints.path(1))
    assert train(tiny(resume=path, max_steps=2)).steps == 2  # nothing of its own yet: the checkpoint that was named
    RunFolder(elsewhere).checkpoints.path(1).unlink()
    for steps, resume in ((3, path), (4, "no")):
        assert train(tiny(resume=resume, max_steps=steps)).steps == steps


def test_a_queue_larger_than_the_training_set_warns(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"method\.queue_size=65 exceeds the 64 training images"):
            train(tiny(method={"queue_size": 65}))


def test_a_full_disk_keeps_the_last_good_checkpoint(tiny, monkeypatch):
    config = tiny(runtime={"save_every": 1})
    real = os.fsync

    def full(descriptor):
        if "step_00000003.pt" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*last good one is .*step_00000002\.pt"):
        train(config)
    monkeypatch.undo()
    assert train(dataclasses.replace(config, resume="auto")).finished


REFUSES_MORE = """
import os, resource
from fastuft.runfolder import Checkpoints
real = Checkpoints.save
def save(self, step, state, **options):
    if step == 3:  # from here on the system refuses to let a file grow beyond a few pages
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    return real(self, step, state, **options)
Checkpoints.save = save
"""


@pytest.mark.e2e
def test_a_write_that_fails_halfway_keeps_the_last_good_checkpoint(tiny, tmp_path):
    config = tiny(runtime={"save_every": 1})
    path = tmp_path / "config.yaml"
    ((status, output),) = run_command(write_config(config, path), prelude=REFUSES_MORE)
    assert status == 2 and "Traceback" not in output
    assert "step_00000003.pt could not be written (File too large); the last good one is" in output
    folder = tmp_path / "run"
    assert [step for step, _ in RunFolder(folder).checkpoints.all()] == [2, 1]
    assert not list(folder.rglob("*.partial"))
    assert final(folder)["global_step"] == 2
    whole = train(dataclasses.replace(config, out=str(tmp_path / "whole"))).run_dir
    train(dataclasses.replace(config, resume="auto"))
    assert_same_state(final(whole), final(folder))


def test_a_backbone_that_cannot_be_written_is_reported(tiny, monkeypatch):
    def full(backbone, path, **metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "export_backbone", full)
    with pytest.raises(
        CheckpointError, match=r"backbone\.safetensors could not be .*No space.*step_00000004\.pt\. Free"
    ):
        train(tiny())


@pytest.mark.parametrize("spoil", ["cut", "foreign"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tiny, tmp_path, spoil):
    config = tiny(runtime={"save_every": 2}, max_steps=4)
    whole = train(tiny(out=str(tmp_path / "whole"))).run_dir
    newest = RunFolder(train(config).run_dir).checkpoints.all()[0][1]
    if spoil == "cut":
        newest.write_bytes(newest.read_bytes()[:-100])
    else:
        torch.save({"state_dict": {}}, newest)
    with pytest.warns(UserWarning, match=r"step_00000004\.pt does not match its digest.*the one before it is used"):
        result = train(dataclasses.replace(config, resume="auto", max_steps=None))
    assert_same_state(final(whole), final(result.run_dir))
    for _, path in RunFolder(result.run_dir).checkpoints.all():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*move the run away to start a new one"):
        train(dataclasses.replace(config, resume="auto"))


def test_a_resumed_run_releases_the_checkpoint(tiny):
    train(tiny(max_steps=1))
    config = tiny(resume="auto")
    ranks = run_module.start_ranks("cpu", 60)
    with run_module.StopSignals() as signals, ExitStack() as closing:
        run = run_module._Run(run_module.assemble(config, ranks, None, closing), signals, Callbacks())
        held = [value for part in (run, run.parts) for value in vars(part).values() if isinstance(value, dict)]
    assert run.progress.global_step == 1 and not any("optimizer" in value for value in held)


def test_a_run_resumes_with_the_same_images_at_another_location(tiny, folders, tmp_path):
    train(tiny(max_steps=1))
    target, source = (str(shutil.copytree(folder, tmp_path / "moved" / Path(folder).name)) for folder in folders)
    moved = {"target": target, "source": source, "data": {"replay_cache": str(tmp_path / "cache")}, "resume": "auto"}
    assert train(tiny(max_steps=2, **moved)).steps == 2
    next(Path(target).rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="content_hash was"):
        train(tiny(max_steps=3, **moved))
