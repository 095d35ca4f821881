"""A run folder: the file that its weights come from, and messages about damaged files."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from fastuft.runfolder import CheckpointError, Progress, RunFolder, json_lines, read_json, read_json_lines
from fastuft.runfolder.checkpoints import check_digest

pytestmark = pytest.mark.filterwarnings("ignore:.* is used instead")


@pytest.fixture
def run(tmp_path):
    """A folder with checkpoints of steps 1 and 2, and a backbone."""
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.checkpoints.save(step, {"x": torch.full((3,), step)}, keep_last=2, keep_every=0)
    save_file({"conv": torch.zeros(4), "bias": torch.zeros(2)}, folder.backbone_file)
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_weights_come_from_the_newest_checkpoint_or_from_the_backbone_first(run):
    assert run.weights_file() == run.checkpoints.path(2)
    assert run.weights_file(backbone_first=True) == run.backbone_file


def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(run):
    cut(run.checkpoints.path(2))
    with pytest.warns(UserWarning, match=r"step_00000002\.pt does not match its digest.*step_00000001\.pt is used"):
        assert run.weights_file() == run.checkpoints.path(1)


def test_without_a_whole_checkpoint_the_backbone_is_used_with_a_warning(run):
    for _, path in run.checkpoints.all():
        cut(path)
    with pytest.warns(UserWarning, match=r"backbone\.safetensors is used instead") as caught:
        assert run.weights_file() == run.backbone_file
    assert len(caught) == 2


DAMAGE = {
    "cut": cut,
    "long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "no header": lambda path: path.write_bytes(struct.pack("<Q", 4) + b"[1,2" + bytes(20)),
    "no tensors": lambda path: path.write_bytes(struct.pack("<Q", 2) + b"{}"),
    "huge header": lambda path: path.write_bytes(b"\xff" * 64),
    "other values": lambda path: path.write_bytes(struct.pack("<Q", 9) + b'{"x": 12}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_backbone_falls_back_to_the_newest_whole_checkpoint(run, damage):
    damage(run.backbone_file)
    cut(run.checkpoints.path(2))
    with pytest.warns(UserWarning, match=r"backbone\.safetensors is truncated.*step_00000001\.pt is used"):
        assert run.weights_file(backbone_first=True) == run.checkpoints.path(1)


def test_a_folder_without_whole_weights_is_refused(run, tmp_path):
    for path in (run.backbone_file, *(path for _, path in run.checkpoints.all())):
        cut(path)
    with pytest.raises(CheckpointError, match=r"has no undamaged weights: .*step_00000002\.pt .*copy the run again"):
        run.weights_file()
    with pytest.raises(CheckpointError, match="is a folder without checkpoints; name a run folder"):
        RunFolder(tmp_path / "other").weights_file()


def test_a_folder_with_a_checkpoint_or_backbone_has_work(run, tmp_path):
    assert run.has_weights
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    other.write_config({"seed": 1}, {"seed": 1})
    other.write_metrics([{"step": 1}])
    assert not other.has_weights
    save_file({"x": torch.zeros(1)}, other.backbone_file)
    assert other.has_weights


def test_records_round_trip(tmp_path):
    folder = RunFolder(tmp_path)
    assert (folder.read_config(), folder.read_given(), folder.read_summary(), folder.read_metrics()) == ({}, {}, {}, [])
    folder.write_config({"model": {"bn": "split"}, "target": ["a", "b"]}, {"model": {"bn": "auto"}})
    folder.write_summary({"steps": 3, "interrupted": None})
    folder.write_metrics([{"step": 1}, {"step": 2}])
    assert folder.read_config() == {"model": {"bn": "split"}, "target": ["a", "b"]}
    assert folder.read_given() == {"model": {"bn": "auto"}}
    assert folder.read_summary() == {"steps": 3, "interrupted": None}
    assert folder.read_metrics() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b""])
def test_a_damaged_record_is_named(tmp_path, content):
    folder = RunFolder(tmp_path)
    folder.summary_file.write_bytes(content)
    with pytest.raises(ValueError, match=r"summary\.json is not"):
        read_json(folder.summary_file)


@pytest.mark.parametrize("content", [b"a: [", b"- 1", b"\xff\xfe\xff", b"just words"])
def test_a_damaged_configuration_is_named(tmp_path, content):
    folder = RunFolder(tmp_path)
    folder.config_file.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        folder.read_config()


def test_damaged_metrics_lines_are_named_and_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\n[3]\n\n{"step": 4}\n{"note": "no step"}\n{"step": 5, "lo')
    rows, complaints = json_lines(path)
    assert rows == [{"step": 1}, {"step": 4}, {"note": "no step"}]
    assert [complaint.split(" is ")[0] for complaint in complaints] == [f"{path}:2", f"{path}:3"]
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON"):
        read_json_lines(path)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:\d is not"):
        assert RunFolder(tmp_path).read_metrics() == [{"step": 1}, {"step": 4}]


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "config.yaml", "checkpoints/step_00000003.pt"])
def test_a_pipe_instead_of_a_file_does_not_block(run, name):
    os.mkfifo(run.path / name)
    reads = {
        "metrics.jsonl": run.read_metrics,
        "summary.json": run.read_summary,
        "config.yaml": run.read_config,
        "checkpoints/step_00000003.pt": lambda: check_digest(run.path / name),
    }
    with pytest.raises((OSError, CheckpointError), match="not a regular file"):
        reads[name]()
    assert run.weights_file() == run.checkpoints.path(2)


def test_a_pipe_instead_of_the_backbone_does_not_block(run):
    run.backbone_file.unlink()
    os.mkfifo(run.backbone_file)
    with pytest.warns(UserWarning, match=r"backbone\.safetensors cannot be read \(not a regular file\)"):
        assert run.weights_file(backbone_first=True) == run.checkpoints.path(2)


def test_progress_counts_steps_and_epochs():
    progress = Progress().after_step(8).after_step(8).after_epoch().after_step(4).at(2.5)
    assert progress == Progress(epoch=1, step=1, global_step=3, images=20, seconds=2.5)
    assert Progress.of({**progress.as_dict(), "model": {}}) == progress


def test_reading_a_run_needs_no_torch(run):
    cut(run.checkpoints.path(2))
    script = (
        "import sys, pathlib\nsys.modules['torch'] = None\nfrom fastuft.runfolder import RunFolder\n"
        f"print(RunFolder(pathlib.Path({str(run.path)!r})).weights_file())"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == str(run.checkpoints.path(1)), done.stderr
