"""Diverged runs, full disks and damaged checkpoints: the last good checkpoint survives."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("filelock")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")

from processes import run as run_command
from processes import write_config
from run_results import assert_same_state, final

from fastuft.runfolder import RunFolder
from fastuft.trainer import CheckpointError, NonFiniteLossError, saving, train
from fastuft.trainer import run as run_module

pytestmark = pytest.mark.filterwarnings("ignore:method.queue_size")


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
