"""A run that is killed at any moment resumes bit-exactly: through the command line, with DALI and mixing."""

from __future__ import annotations

import json

import pytest
from processes import AT_STEP, run, write_config
from run_results import assert_same_state, final

from fastuft.randomness import keyed_generator

pytestmark = pytest.mark.e2e

# Kills the process half-way through the writing of a checkpoint.
WHILE_WRITING = """
import os, signal
from fastuft.atomic import whole_file
from fastuft.model.checkpoint import exporting
from fastuft.runfolder import checkpoints, folder
real = checkpoints.write_whole
def killed(path, content):
    if path.name == {name!r}:
        with whole_file(path) as partial:
            partial.write_bytes(bytes(content[: len(content) // 2]))
            os.kill(os.getpid(), signal.SIGKILL)
    real(path, content)
for module in (exporting, checkpoints, folder):
    module.write_whole = killed
"""
PARTS = ("keys", "forward", "loss", "backward", "mix", "optimizer", "momentum", "enqueue")


@pytest.fixture
def command(tiny, tmp_path):
    config = tiny(
        data={"loader": "dali"}, optim={"epochs": 3}, runtime={"save_every": 2, "log_every": 2}, resume="auto"
    )
    arguments = write_config(config, tmp_path / "config.yaml")
    return lambda out, prelude="": run([*arguments, "--out", str(tmp_path / out)], 1, prelude)[0]


def die(command, preludes):
    for prelude in preludes:
        status, output = command("killed", prelude)
        assert status == -9, output


def assert_goes_on_to_the_same_end(command, tmp_path):
    status, output = command("killed")
    assert status == 0, output
    whole, killed = (final(tmp_path / name) for name in ("whole", "killed"))
    assert_same_state(whole, killed)
    assert killed["global_step"] == 12
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]


def kill_and_compare(command, tmp_path, preludes):
    assert command("whole")[0] == 0
    die(command, preludes)
    assert_goes_on_to_the_same_end(command, tmp_path)


def points(count, seed=0):
    """(step to die in, counted from the resumed step; part of the step)."""
    generator = keyed_generator(seed, "kill points")
    return [(int(generator.integers(1, 4)), PARTS[generator.integers(len(PARTS))]) for _ in range(count)]


def test_a_run_survives_kills_within_steps_and_checkpoints(command, tmp_path):
    (calls, part), *_ = points(1)
    preludes = [AT_STEP.format(calls=calls + 2, part=part), WHILE_WRITING.format(name="step_00000006.pt")]
    kill_and_compare(command, tmp_path, [*preludes, AT_STEP.format(calls=2, part="enqueue")])


@pytest.mark.slow
def test_a_run_survives_kills_at_twenty_points(command, tmp_path):
    assert command("whole")[0] == 0
    for number in range(4):  # runs of five deaths each: too few steps between them to reach the end
        target = tmp_path / "killed"
        die(command, [AT_STEP.format(calls=calls, part=part) for calls, part in points(20)[number * 5 :][:5]])
        assert_goes_on_to_the_same_end(command, tmp_path)
        target.rename(tmp_path / f"killed{number}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["step_00000002.sha256", "step_00000004.sha256", "step_00000004.pt", "backbone.safetensors", "metrics.jsonl"],
)
def test_a_run_survives_kills_during_writes(command, tmp_path, name):
    kill_and_compare(command, tmp_path, [WHILE_WRITING.format(name=name)])
