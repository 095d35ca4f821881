"""Kill, stop, freeze and resume repeatedly: no row of metrics is lost or repeated, and training is unchanged."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from processes import finish, start, write_config
from run_results import rows

from fastuft.runfolder import RunFolder, load_checkpoint

# Seconds per case; `FASTUFT_KILL_SECONDS=600` is what a release takes.
DURATION = float(os.environ.get("FASTUFT_KILL_SECONDS", "40"))
TIMEOUT = 30.0  # of the run: a rank that is frozen for longer is lost to the others
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def saved_step(folder: RunFolder, before: int) -> int:
    """The step of the newest checkpoint, which is whole; every step up to it has exactly one row."""
    newest = folder.checkpoints.newest(load_checkpoint)
    assert not newest.reasons
    step = newest.content["global_step"] if newest.content else 0
    assert step >= before
    assert [row["step"] for row in folder.read_metrics() if row["step"] <= step] == list(range(1, step + 1))
    return step


def newest_step(folder: RunFolder) -> int:
    """The newest step by the names of checkpoints; rows of metrics may be ahead of it and are then repeated."""
    return next((step for step, _ in folder.checkpoints.all()), 0)


def comes_further(folder: RunFolder, step: int, ranks: Sequence[subprocess.Popen]) -> bool:
    """Wait until the run has saved a later step; False if a process ends before that."""
    give_up = time.monotonic() + 180
    while newest_step(folder) <= step:
        if any(process.poll() is not None for process in ranks):
            return False
        assert time.monotonic() < give_up, "the run does not go on"
        time.sleep(0.25)
    return True


class Disturbances:
    """Events that hit the processes of one run, drawn with a seed."""

    def __init__(self, seed: int) -> None:
        self.draws, self.done = random.Random(seed), Counter()

    def _hit(self, ranks: Sequence[subprocess.Popen]) -> Sequence[subprocess.Popen]:
        return ranks if self.draws.random() < 0.5 else [self.draws.choice(ranks)]

    def freeze(self, ranks: Sequence[subprocess.Popen]) -> bool:
        """Stop processes with SIGSTOP for a while; returns whether the others may have given them up."""
        seconds = TIMEOUT + 8 if self.draws.random() < 0.1 else self.draws.uniform(0.1, 4.0)
        hit = self._hit(ranks)
        for process in hit:
            process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        for process in hit:
            process.send_signal(signal.SIGCONT)
        self.done["frozen"] += 1
        return seconds > TIMEOUT and len(ranks) > 1

    def end(self, ranks: Sequence[subprocess.Popen]) -> None:
        """End the run with a signal to all of its processes or to one."""
        number = signal.SIGKILL if self.draws.random() < 0.5 else self.draws.choice(STOPS)
        for process in self._hit(ranks):
            process.send_signal(number)
        results = finish(ranks)
        statuses = {status for status, _ in results}
        # A stop may come before the run can catch it (130 is Python's answer to SIGINT), or while another rank starts.
        assert statuses <= {85, 1, 130, -number}, results
        self.done["killed" if number == signal.SIGKILL else "stopped"] += 1


def one_part(
    arguments: Sequence[str], folder: RunFolder, world_size: int, disturbances: Disturbances, step: int
) -> None:
    """Start or resume the run, and let an event end it."""
    ranks = start(arguments, world_size)
    if disturbances.draws.random() < 0.25:  # while it starts
        time.sleep(disturbances.draws.uniform(0.5, 10.0))
    else:
        assert comes_further(folder, step, ranks), finish(ranks)
        time.sleep(disturbances.draws.uniform(0.0, 2.0))
    assert all(process.poll() is None for process in ranks), finish(ranks)
    if disturbances.draws.random() < 0.4:
        before = newest_step(folder)
        may_be_lost = disturbances.freeze(ranks)
        if not comes_further(folder, before, ranks):
            results = finish(ranks)
            assert may_be_lost and {status for status, _ in results} == {1}, results
            return
    disturbances.end(ranks)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("sizes", [(1,), (2,), (1, 2)], ids=["one rank", "two ranks", "one and two in turn"])
def test_repeated_kills_stops_and_freezes_lose_no_row(tiny, tmp_path, sizes):
    config = tiny(
        resume="auto",
        model={"bn": "plain"},
        optim={"epochs": 100_000},
        runtime={"save_every": 5, "keep_last": 2, "timeout": TIMEOUT},
    )
    arguments, folder = write_config(config, tmp_path / "c.yaml"), RunFolder(Path(config.out))
    disturbances, step, parts = Disturbances(len(sizes) * 10 + sizes[0]), 0, 0
    end = time.monotonic() + DURATION
    while time.monotonic() < end or not step or len(disturbances.done) < 3:
        one_part(arguments, folder, sizes[parts % len(sizes)], disturbances, step)
        step, parts = saved_step(folder, step), parts + 1
    steps = step + 3
    for out in (config.out, str(tmp_path / "undisturbed")):
        results = finish(start([*arguments, "--out", out, "--max_steps", str(steps)], sizes[0]), 1800)
        assert {status for status, _ in results} == {0}, results
    assert [row["step"] for row in folder.read_metrics()] == list(range(1, steps + 1))
    if len(sizes) == 1:
        assert rows(folder.path) == rows(tmp_path / "undisturbed")
        disturbed, undisturbed = (
            load_checkpoint(RunFolder(run_folder).checkpoints.path(steps))
            for run_folder in (folder.path, tmp_path / "undisturbed")
        )
        for part in ("model", "queue", "optimizer", "rank_buffers", "torch_rng"):
            torch.testing.assert_close(disturbed[part], undisturbed[part], rtol=0, atol=0, equal_nan=True)
    print(f"{sizes} ranks: {dict(disturbances.done)}, {parts} parts, {steps} steps, each row once")
