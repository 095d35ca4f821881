"""Run folders with another run, with weights, or removed during training."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("PIL")
pytest.importorskip("filelock")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")


from fastuft.runfolder import FolderInUseError, FolderLostError, RunFolder
from fastuft.trainer import run as run_module
from fastuft.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore:method.queue_size")


def test_a_folder_with_a_run_is_refused(tiny):
    train(tiny(max_steps=1))
    with pytest.raises(ValueError, match=r"already has a run; continue it with resume=auto"):
        train(tiny(max_steps=1))


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
