"""torchrun restarts a run that has lost a process from its last checkpoint, on the remaining ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import ROOT, environment, free_port, write_config

from fastuft.runfolder import RunFolder, load_checkpoint

# A rank dies in the second epoch of the first start.
DIES_ONCE = """
import os, signal, sys
from fastuft.trainer import run
real = run.train_step
def dies(learner, batch, mark, **options):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and (batch.epoch, batch.step) == (1, 1):
        WHAT
    return real(learner, batch, mark, **options)
run.train_step = dies
from fastuft.cli import main
sys.exit(main(sys.argv[1:]))
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def torchrun(script, arguments, *options):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--monitor-interval=0.2",
        *options,
        str(script),
        *arguments,
    ]
    return subprocess.Popen(
        command,
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(agent):
    """End an agent and its child processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(agent.pid, signal.SIGKILL)
    agent.communicate()


@pytest.fixture
def run(tiny, tmp_path):
    """(configuration, its arguments, script) of a run of 8 steps with a checkpoint every third and ``resume: no``."""
    config = tiny(runtime={"save_every": 3, "timeout": 60.0})
    script = tmp_path / "run.py"
    script.write_text(DIES_ONCE.replace("WHAT", KILLED))
    return config, write_config(config, tmp_path / "c.yaml"), script


def assert_finished(config, world_size):
    folder = RunFolder(type(ROOT)(config.out))
    summary = folder.read_summary()
    assert summary["finished"] and summary["world_size"] == world_size
    assert [row["step"] for row in folder.read_metrics()] == list(range(1, 9))  # each row once
    assert load_checkpoint(folder.checkpoints.path(8))["images"] == 128


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_recovers_after_a_rank_is_killed(run):
    config, arguments, script = run
    agent = torchrun(script, arguments, "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    try:
        output, _ = agent.communicate(timeout=240)
    finally:
        end(agent)
    assert agent.returncode == 0, output
    assert "resumed at step 3" in output and "already has a run" not in output
    assert_finished(config, 2)


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_continues_with_the_remaining_ranks_after_a_node_loss(run):
    config, arguments, script = run
    rendezvous = [
        "--nnodes=1:2",
        "--nproc-per-node=1",
        "--max-restarts=2",
        "--rdzv-backend=c10d",
        "--rdzv-id=lost-node",
    ]
    rendezvous += [f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    rendezvous += ["--rdzv-conf=join_timeout=60,last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"]
    script.write_text(DIES_ONCE.replace("WHAT", "os.killpg(os.getppid(), signal.SIGKILL)\n        " + KILLED))
    stays = torchrun(script, arguments, *rendezvous)
    time.sleep(3)  # the first agent holds the rendezvous and must survive
    lost = torchrun(script, arguments, *rendezvous)
    try:
        output, _ = stays.communicate(timeout=400)
    finally:
        end(lost)
        end(stays)
    assert stays.returncode == 0, output
    assert "resumed at step 3" in output
    assert_finished(config, 1)


@pytest.mark.slow
@pytest.mark.e2e
def test_a_deliberate_stop_is_not_restarted(run):
    config, arguments, script = run
    script.write_text(DIES_ONCE.replace("WHAT", "os.kill(os.getpid(), signal.SIGTERM)"))
    agent = torchrun(script, arguments, "--standalone", "--nproc-per-node=2", "--max-restarts=3")
    try:
        output, _ = agent.communicate(timeout=240)
    finally:
        end(agent)
    assert agent.returncode == 0, output
    folder = RunFolder(type(ROOT)(config.out))
    assert folder.stopped_file.exists() and folder.read_summary()["steps"] in (6, 7)
