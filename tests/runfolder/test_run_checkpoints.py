"""Checkpoint files: damaged ones are refused, the one before is used, and only the configured number is kept."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch

from fastuft.runfolder import CheckpointError, Checkpoints, load_checkpoint

KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from fastuft.atomic import whole_file
with whole_file(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def save(folder, step, keep_last=2, keep_every=0):
    state = {"x": torch.full((5,), step)}
    return Checkpoints(folder).save(step, state, keep_last=keep_last, keep_every=keep_every)


def kept(folder):
    return [step for step, _ in Checkpoints(folder).all()]


def newest(folder):
    return Checkpoints(folder).newest(load_checkpoint)


def sign(path):
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


def test_keep_last_and_keep_every_are_followed(tmp_path):
    for step in range(1, 11):
        save(tmp_path, step, keep_last=2, keep_every=4)
    assert kept(tmp_path) == [10, 9, 8, 4]
    assert len(list(tmp_path.iterdir())) == 8  # each with its digest, nothing else
    assert torch.equal(load_checkpoint(Checkpoints(tmp_path).path(8))["x"], torch.full((5,), 8))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "truncated or altered"),
        (lambda path: path.write_bytes(b"\0" + path.read_bytes()[1:]), "truncated or altered"),
        (lambda path: path.write_bytes(b""), "truncated or altered"),
        (lambda path: path.with_suffix(".sha256").unlink(), "has no digest"),
        (lambda path: (path.write_bytes(b"not a checkpoint"), sign(path)), "is not a checkpoint"),
        (lambda path: (torch.save({"state_dict": {}}, path), sign(path)), "use it as init instead"),
        (lambda path: (torch.save({"format": os.path.join}, path), sign(path)), "is not a checkpoint"),
    ],
    ids=["cut", "flipped", "empty", "unsigned", "foreign", "other-program", "code"],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(tmp_path, spoil, reason):
    save(tmp_path, 1)
    spoil(save(tmp_path, 2))
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(Checkpoints(tmp_path).path(2))
    found = newest(tmp_path)
    assert found.path == Checkpoints(tmp_path).path(1)
    assert torch.equal(found.content["x"], torch.ones(5, dtype=torch.int64))
    assert len(found.reasons) == 1 and "step_00000002.pt" in found.reasons[0]


def test_leftovers_of_a_killed_writer_are_removed_and_never_read(tmp_path):
    save(tmp_path, 1)
    subprocess.run([sys.executable, "-c", KILLED_WRITER, Checkpoints(tmp_path).path(2)], check=False)
    assert len(list(tmp_path.glob("*.partial"))) == 1
    assert newest(tmp_path).path == Checkpoints(tmp_path).path(1)
    save(tmp_path, 3)
    assert not list(tmp_path.glob("*.partial"))


def test_a_disk_error_keeps_the_earlier_checkpoints(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*step_00000001\.pt.*resume=auto"):
        save(tmp_path, 2)
    assert kept(tmp_path) == [1]
    assert load_checkpoint(Checkpoints(tmp_path).path(1))["x"].sum() == 5
    assert not list(tmp_path.glob("*.partial"))


def test_an_empty_folder_has_no_checkpoints(tmp_path):
    found = newest(tmp_path / "nowhere")
    assert (found.path, found.content, found.reasons) == (None, None, ())


@pytest.mark.parametrize("keep_last", [1, 2])
def test_damaged_checkpoints_do_not_displace_whole_ones(tmp_path, keep_last):
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=3)
    for step in (3, 5):
        Checkpoints(tmp_path).path(step).write_bytes(b"cut")  # the run has resumed from before step 5
    save(tmp_path, 4, keep_last=keep_last)
    assert newest(tmp_path).path == Checkpoints(tmp_path).path(4)
    assert kept(tmp_path) == ([5, 4] if keep_last == 1 else [5, 4, 3, 2])
    save(tmp_path, 5, keep_last=keep_last)
    assert kept(tmp_path) == [5, 4][:keep_last]
