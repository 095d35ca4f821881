"""Resumed runs: bit-exact continuation, and what may change in between."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("PIL")
pytest.importorskip("filelock")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")

from run_results import assert_same_state, final, rows

from fastuft.runfolder import RunFolder
from fastuft.trainer import Callbacks, train
from fastuft.trainer import run as run_module

pytestmark = pytest.mark.filterwarnings("ignore:method.queue_size")


def assert_parts_equal(whole, stops, tiny, tmp_path, changes):
    """A run that is stopped after each of ``stops`` steps and resumed ends like the uninterrupted one."""
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


@pytest.mark.parametrize("first", [{}, {"bn": "split"}], ids=["chosen, then named", "named, then chosen"])
def test_giving_a_chosen_value_is_not_a_changed_setting(tiny, first):
    train(tiny(max_steps=1, model=first))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the run continues with settings that have changed")
        train(tiny(max_steps=2, resume="auto", model={} if first else {"bn": "split"}))
    with pytest.warns(UserWarning, match=r"model\.bn 'split' -> 'plain'"):
        train(tiny(max_steps=3, resume="auto", model={"bn": "plain"}))


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


def test_rows_of_a_start_without_a_checkpoint_are_replaced(tiny):
    config = tiny(max_steps=2, resume="auto")
    (folder := train(config).run_dir / "checkpoints").rename(folder.with_name("lost"))
    folder.with_name("backbone.safetensors").unlink()
    train(config)
    assert [row["step"] for row in rows(folder.parent)] == [1, 2]


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


def test_restarted_ranks_resume_whatever_the_resume_option_says(tiny, tmp_path, monkeypatch):
    elsewhere = train(tiny(out=str(tmp_path / "elsewhere"), max_steps=1)).run_dir
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    path = str(RunFolder(elsewhere).checkpoints.path(1))
    assert train(tiny(resume=path, max_steps=2)).steps == 2  # nothing of its own yet: the checkpoint that was named
    RunFolder(elsewhere).checkpoints.path(1).unlink()
    for steps, resume in ((3, path), (4, "no")):
        assert train(tiny(resume=resume, max_steps=steps)).steps == steps


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
