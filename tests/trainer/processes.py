"""Runs of the command line in separate processes, alone or as the ranks of one run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from fastuft.config import TrainConfig
from fastuft.trainer.resolved import plain

ROOT = Path(__file__).resolve().parents[2]

# Kills the process when a part of its n-th step is reached.
AT_STEP = """
import os, signal
from fastuft.trainer import run
real, calls = run.train_step, []
def killed(learner, batch, mark, **options):
    calls.append(0)
    if len(calls) < {calls}:
        return real(learner, batch, mark, **options)
    def marks(part):
        if part == {part!r}:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(learner, batch, marks, **options)
run.train_step = killed
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more: object) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in more.items()}}


def write_config(config: TrainConfig, path: Path) -> list[str]:
    """Write the configuration to a file; returns the arguments of the command line that read it."""
    path.write_text(yaml.safe_dump(plain(config)))
    return ["pretrain", "--config", str(path)]


def _hears_hangups() -> None:
    """Restore the default SIGHUP handling of a terminal, because signals that ``nohup`` ignores stay ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(arguments: Sequence[str], ranks: int = 1, prelude: str = "") -> list[subprocess.Popen]:
    """Start ``fastuft ARGUMENTS`` on that many ranks; ``prelude`` is Python code to run first."""
    script = f"import sys\n{prelude}\nfrom fastuft.cli import main\nsys.exit(main(sys.argv[1:]))"
    port, started = free_port(), []
    for rank in range(ranks):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        started.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", script, *arguments],
                env=environment(**variables, MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                preexec_fn=_hears_hangups,
            )
        )
    return started


def finish(started: Sequence[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str]]:
    """(exit status, output) of each process."""
    try:
        results = []
        for process in started:
            output, _ = process.communicate(timeout=timeout)
            results.append((process.returncode, output))
        return results
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()


def run(arguments: Sequence[str], ranks: int = 1, prelude: str = "") -> list[tuple[int, str]]:
    return finish(start(arguments, ranks, prelude))
