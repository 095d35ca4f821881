"""Kill, stop and resume over and over, on one rank and two: no row of metrics is lost or comes twice."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from processes import finish, start, write_config

from fastuft.runfolder import RunFolder, load_checkpoint
from fastuft.trainer import train

# Seconds; `FASTUFT_KILL_SECONDS=1200` is what a release takes.
DURATION = float(os.environ.get("FASTUFT_KILL_SECONDS", "45"))
KILL, STOP = (signal.SIGKILL,), (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def assert_nothing_lost(folder: RunFolder, before: int) -> int:
    """Each step up to the newest checkpoint has one row, and no checkpoint went lost; the checkpoint's step."""
    newest = folder.checkpoints.newest(load_checkpoint)
    assert not newest.reasons
    step = newest.content["global_step"] if newest.content else 0
    assert step >= before
    assert [row["step"] for row in folder.read_metrics() if row["step"] <= step] == list(range(1, step + 1))
    return step


def wait_for_a_step(folder: RunFolder, step: int) -> None:
    """Until the run has come further than ``step``."""
    give_up = time.monotonic() + 120
    while not any(row["step"] > step for row in folder.read_metrics()):
        assert time.monotonic() < give_up
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore:method.queue_size")
@pytest.mark.parametrize("most_ranks", [1, 2])
def test_no_row_is_lost_however_often_a_run_is_killed_or_stopped(tiny, tmp_path, most_ranks):
    config = tiny(
        resume="auto",
        model={"bn": "plain"},
        optim={"epochs": 100_000},
        runtime={"save_every": 5, "keep_last": 2, "timeout": 30.0},
    )
    arguments, folder = write_config(config, tmp_path / "c.yaml"), RunFolder(Path(config.out))
    draws = random.Random(most_ranks)
    step, rounds, end = 0, {"killed": 0, "stopped": 0}, time.monotonic() + DURATION
    while time.monotonic() < end or not step or not all(rounds.values()):
        ranks = start(arguments, draws.randint(1, most_ranks))
        if draws.random() < 0.25:  # while it starts
            time.sleep(draws.uniform(0.5, 10.0))
        else:
            wait_for_a_step(folder, step)
            time.sleep(draws.uniform(0.0, 2.0))
        assert all(process.poll() is None for process in ranks), finish(ranks)
        number = draws.choice(draws.choice((KILL, STOP)))
        hit = ranks if draws.random() < 0.5 else [draws.choice(ranks)]
        for process in hit:
            process.send_signal(number)
        results = finish(ranks)
        statuses = {status for status, _ in results}
        # A stop may come before the run can catch it (130 is Python's answer to SIGINT), or while the other rank starts.
        assert statuses <= {85, 1, 130, -number}, results
        rounds["killed" if number == signal.SIGKILL else "stopped"] += 1
        step = assert_nothing_lost(folder, step)
    result = train(
        tiny(out=config.out, resume="auto", model={"bn": "plain"}, optim={"epochs": 100_000}, max_steps=step + 3)
    )
    assert result.steps == step + 3
    assert [row["step"] for row in folder.read_metrics()] == list(range(1, step + 4))
    print(f"{rounds['killed']} kills, {rounds['stopped']} stops, {step + 3} steps")
