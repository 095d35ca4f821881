"""Signals that stop a run: a checkpoint is saved first, and the status suits the launcher."""

from __future__ import annotations

import os
import signal

import pytest

pytest.importorskip("PIL")
pytest.importorskip("filelock")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")

from processes import write_config
from run_results import assert_same_state, final

from fastuft.cli import main
from fastuft.data import TrainStream
from fastuft.runfolder import RunFolder, read_json
from fastuft.trainer import run as run_module
from fastuft.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore:method.queue_size")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_within_the_step_and_stops(tiny, tmp_path, monkeypatch, number):
    whole = train(tiny(out=str(tmp_path / "whole"))).run_dir
    real = run_module.train_step

    def interrupted(learner, batch, mark, **options):
        if (batch.epoch, batch.step) == (1, 1):
            os.kill(os.getpid(), number)
        return real(learner, batch, mark, **options)

    caught = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    if (
        signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    ):  # as nohup leaves it for the whole suite; a run keeps that choice
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    handlers = [signal.getsignal(n) for n in caught]
    monkeypatch.setattr(run_module, "train_step", interrupted)
    result = train(tiny())
    assert (result.interrupted, result.steps, result.finished) == (signal.Signals(number).name, 6, False)
    assert handlers == [signal.getsignal(n) for n in caught]
    stopped = read_json(RunFolder(result.run_dir).stopped_file)
    assert stopped == {"signal": signal.Signals(number).name, "step": 6, "epoch": 1}
    monkeypatch.undo()
    train(tiny(resume="auto"))
    assert_same_state(final(whole), final(result.run_dir))
    assert not RunFolder(result.run_dir).stopped_file.exists()


def prefill_with_signal(real):
    def prefill(self, count):
        for views in real(self, count):
            os.kill(os.getpid(), signal.SIGTERM)
            yield views

    return prefill


def test_a_signal_during_prefill_stops_the_run(tiny, monkeypatch):
    monkeypatch.setattr(TrainStream, "prefill", prefill_with_signal(TrainStream.prefill))
    result = train(tiny())
    assert (result.interrupted, result.steps) == ("SIGTERM", 0)


@pytest.mark.parametrize(("launcher", "status"), [(None, 85), ("run7", 0)], ids=["plain", "torchelastic"])
def test_a_deliberate_stop_has_the_status_that_the_launcher_expects(
    tiny, tmp_path, monkeypatch, capsys, launcher, status
):
    arguments = write_config(tiny(), tmp_path / "config.yaml")
    monkeypatch.setattr(TrainStream, "prefill", prefill_with_signal(TrainStream.prefill))
    if launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launcher)
    assert main(arguments) == status
    assert "before anything was saved; start it again" in capsys.readouterr().err
    monkeypatch.undo()
    assert read_json(RunFolder(tmp_path / "run").stopped_file)["step"] == 0
    assert main(arguments) == 0  # nothing was saved, so nothing blocks the folder
