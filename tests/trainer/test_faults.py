"""Runs in odd environments: interpreter flags, few open files, little shared memory, jumping clocks."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import ROOT, environment, write_config

from fastuft.runfolder import RunFolder, load_checkpoint
from fastuft.trainer import train
from fastuft.trainer.distributed import Ranks
from fastuft.trainer.memory import check_memory

pytestmark = pytest.mark.filterwarnings("ignore:method.queue_size")
PYTHON = f"{sys.executable} -m fastuft.cli"


def steps(folder):
    return [row["step"] for row in RunFolder(Path(folder)).read_metrics()]


SHELLS = {
    "python -O": f"{sys.executable} -O -m fastuft.cli $ARGUMENTS",
    "warnings are errors": f"PYTHONWARNINGS=error {PYTHON} $ARGUMENTS",
    "locale C": f"LC_ALL=C {PYTHON} $ARGUMENTS",
    "64 open files": f"ulimit -n 64; {PYTHON} $ARGUMENTS",
    "reader gone": f"set -o pipefail; {PYTHON} $ARGUMENTS | head -1",
    "reader of everything gone": f"set -o pipefail; {PYTHON} $ARGUMENTS 2>&1 | head -1",
    "no output": f"{PYTHON} $ARGUMENTS >&- 2>&-",
    "no input": f"{PYTHON} $ARGUMENTS <&-",
    "small /dev/shm": f"unshare -m sh -c 'mount -t tmpfs -o size=64k tmpfs /dev/shm && {PYTHON} $ARGUMENTS'",
}


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("shell", SHELLS.values(), ids=SHELLS)
def test_a_run_completes_in_an_odd_environment(tiny, tmp_path, folders, shell):
    if "unshare" in shell and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no permission to mount")
    target = tmp_path / "Übung"
    shutil.copytree(folders[0], target)
    config = tiny(target=str(target), source=None, max_steps=2, method={"queue_size": 32})
    config = dataclasses.replace(config, out=str(tmp_path / "läuft"))
    arguments = " ".join(write_config(config, tmp_path / "c.yaml"))
    done = subprocess.run(
        ["bash", "-c", shell], env=environment(ARGUMENTS=arguments), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert steps(config.out) == [1, 2]


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_works_in_a_folder_with_a_non_utf8_name(tiny, tmp_path):
    config = tiny(max_steps=1, out=os.fsdecode(os.fsencode(tmp_path) + b"/l\xe4uft"), runtime={"tensorboard": True})
    train(config)
    assert steps(config.out) == [1]


def test_clock_jumps_do_not_change_training(tiny, tmp_path, monkeypatch):
    whole = train(tiny(out=str(tmp_path / "whole"))).run_dir
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(-1e9, 4e9))
    train(tiny(max_steps=3))
    folder = train(tiny(resume="auto")).run_dir
    monkeypatch.undo()
    left, right = (load_checkpoint(RunFolder(path).checkpoints.path(8)) for path in (whole, folder))
    torch.testing.assert_close(left["model"], right["model"], rtol=0, atol=0)
    assert left["images"] == right["images"] and 0 < right["seconds"] < 600
    rows = RunFolder(folder).read_metrics()
    assert all(row["images_per_second"] > 0 and 0 <= row["data_wait_share"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": {"queue_size": 10**12}},
            r"method\.queue_size=1000000000000 keys of model\.head_dim=16 numbers need 64 TB, but there are .*B; choose a",
        ),
        (
            {"augment": {"size": 100_000}},
            r"augment\.size=100000 with 16 images per process .* need 8 TB, but there are",
        ),
        ({"data": {"prefetch": 10**12}}, r"data\.prefetch=1000000000000 need 393 PB, but there are"),
    ],
)
def test_impossible_memory_is_refused_before_allocation(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(**changes))


def test_memory_is_estimated_per_process_and_precision(tiny, monkeypatch):
    ranks = Ranks(0, 2, torch.device("cpu"))
    views = {"augment": {"size": 256}, "data": {"batch_size": 64, "prefetch": 2}}
    needed = 2 * 32 * 3 * 256 * 256 * 4 * 2
    monkeypatch.setattr("fastuft.trainer.memory.total_memory", lambda _: needed - 1)
    with pytest.raises(ValueError, match="with 32 images per process"):
        check_memory(tiny(**views), ranks)
    check_memory(tiny(**views, runtime={"precision": "bf16"}), ranks)
    monkeypatch.setattr("fastuft.trainer.memory.total_memory", lambda _: needed)
    check_memory(tiny(**views), ranks)


def test_a_long_log_interval_needs_no_memory(tiny):
    assert train(tiny(max_steps=1, runtime={"log_every": 10**15})).steps == 1
