"""The job array example, with stand-ins for the scheduler and the program."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "reproduce.sbatch"


@pytest.fixture
def job(tmp_path):
    """Run the script; ``fastuft`` is the given shell code, and ``scontrol`` logs its requests."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(name, code):
        (folder / name).write_text(f"#!/bin/bash\n{code}\n")
        (folder / name).chmod(0o755)

    write("scontrol", f'echo "$@" >> {tmp_path}/asked')

    def start(program):
        write("fastuft", f'echo "$@" > {tmp_path}/started\n{program}')
        slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "12", "SLURM_JOB_ID": "77"}
        environment = {**os.environ, **slurm, "PATH": f"{folder}:{os.environ['PATH']}"}
        return subprocess.Popen(["bash", str(SCRIPT), "data", "weights.pth", "out"], env=environment)

    return start


def test_each_array_task_runs_its_share_and_returns_its_status(job, tmp_path):
    assert job("exit 1").wait(timeout=60) == 1
    started = (tmp_path / "started").read_text()
    assert "--task 3 --tasks 12" in started and "--data data --weights.unsupervised_resnet50 weights.pth" in started
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("program", "status"),
    [
        # A training saves first, an evaluation is ended by the signal.
        ("trap 'sleep 0.5; exit 85' USR1; touch {ready}; while true; do sleep 0.1; done", 85),
        ("touch {ready}; exec sleep 60", 138),
    ],
)
def test_the_timeout_signal_is_forwarded_and_the_job_requeued(job, tmp_path, program, status):
    ready = tmp_path / "ready"
    process = job(program.format(ready=ready))
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # the script has set its trap
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == status
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
