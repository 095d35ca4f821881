"""The example job: one process per GPU; only the status of a preemption requeues it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fastuft.trainer import EXIT_PREEMPTED

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "examples" / "slurm" / "finetune.sbatch"
PROGRAMS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_PROCID=3 SLURM_LOCALID=1 "$@"',
    "scontrol": '[[ $1 == show ]] && printf "node7\\nnode8\\n"; echo "scontrol $*" >> "$LOG"',
    "fastuft": 'env | grep -E "^(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)=" >> "$LOG"\n'
    'echo "fastuft $*" >> "$LOG"; [[ -z $STOPS ]] || { mkdir -p "$STOPS"; touch "$STOPS/stopped.json"; }; exit "$STATUS"',
}


@pytest.fixture
def job(tmp_path):
    """Run the job with stand-ins for Slurm's programs; returns (exit status, lines that they logged)."""
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(status, *arguments, stops=""):
        slurm = {"JOB_ID": 123, "JOB_NODELIST": "node[7-8]", "NTASKS": 8, "NTASKS_PER_NODE": 4, "CPUS_PER_TASK": 12}
        more = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        path, log = f"{tmp_path}:{os.environ['PATH']}", tmp_path / "log"
        environment = {**os.environ, **more, "PATH": path, "LOG": str(log), "STATUS": str(status), "STOPS": stops}
        done = subprocess.run(
            ["bash", str(JOB), *arguments], env=environment, capture_output=True, text=True, timeout=60
        )
        return done.returncode, log.read_text().splitlines() if log.exists() else done.stderr.splitlines()

    return run


ARGUMENTS = ("moco v2.pth", "photos", "imagenet", "runs/one")


@pytest.mark.parametrize("status", [0, 1, EXIT_PREEMPTED])
def test_only_a_preempted_run_is_requeued(job, status):
    code, lines = job(status, *ARGUMENTS)
    assert code == status
    assert ("scontrol requeue 123" in lines) == (status == EXIT_PREEMPTED)
    assert "fastuft finetune --resume auto --init moco v2.pth --target photos --source imagenet --out runs/one" in lines
    variables = {
        "RANK=3",
        "LOCAL_RANK=1",
        "WORLD_SIZE=8",
        "LOCAL_WORLD_SIZE=4",
        "MASTER_ADDR=node7",
        "MASTER_PORT=20123",
    }
    assert variables <= set(lines)


def test_a_stopped_run_is_requeued_whatever_status_the_launcher_returns(job, tmp_path):
    run = tmp_path / "run"
    _, lines = job(1, *ARGUMENTS[:3], str(run), stops=str(run))
    assert "scontrol requeue 123" in lines
    (tmp_path / "log").unlink()
    code, lines = job(1, *ARGUMENTS[:3], str(run))  # what the stop before has left does not count
    assert code == 1 and "scontrol requeue 123" not in lines


def test_missing_arguments_are_named(job):
    code, lines = job(0, "checkpoint")
    assert code == 2 and lines == [f"usage: sbatch {JOB} CHECKPOINT TARGET SOURCE RUN"]
