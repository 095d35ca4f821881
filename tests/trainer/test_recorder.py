"""The records of a run: rows, TensorBoard, Weights & Biases, the progress bar; missing packages are named."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import types
from pathlib import Path

import pytest

from fastuft.config import RuntimeConfig
from fastuft.runfolder import RunFolder
from fastuft.trainer import train
from fastuft.trainer.recorder import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:method.queue_size")


def row(step, **more):
    figures = {"loss": 1.5, "images_per_second": 1234.0, "seconds_per_step": 0.5, "data_wait_share": 0.25, "lr": 0.1}
    return {"kind": "train", "step": step, "epoch": 1, **figures, "seconds": {"data": 0.1, "mix": 0.2}, **more}


def recorder(folder, resumed_step=0, total_steps=100, **runtime):
    runtime = {"tensorboard": False, **runtime}
    return Recorder(
        RunFolder(folder), RuntimeConfig(**runtime), enabled=True, total_steps=total_steps, resumed_step=resumed_step
    )


def without(monkeypatch, name):
    """Make a package look uninstalled."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *more: None if asked == name else real(asked, *more))


def test_tensorboard_gets_every_figure(tmp_path):
    writer = recorder(tmp_path, tensorboard=True)
    writer.write(row(10))
    writer.write(row(20, loss=0.5))
    writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 1.5), (20, 0.5)]
    assert events.Scalars("train/seconds/mix")[0].value == pytest.approx(0.2)


def test_missing_tensorboard_is_named(tmp_path, monkeypatch, capsys):
    without(monkeypatch, "tensorboard")
    recorder(tmp_path, tensorboard=True).close()
    assert "TensorBoard is not installed: metrics go only to metrics.jsonl" in capsys.readouterr().out


def test_wandb_gets_every_figure_and_resumes_its_run(tmp_path, monkeypatch):
    logged, started = [], []
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)

    def init(**options):
        started.append(options)
        return types.SimpleNamespace(log=lambda figures, step: logged.append((step, figures)), finish=lambda: None)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    for step in (10, 20):
        writer = recorder(tmp_path, resumed_step=step - 10, wandb=True)
        writer.write(row(step))
        writer.close()
    assert [step for step, _ in logged] == [10, 20]
    assert logged[0][1]["train/loss"] == 1.5 and logged[0][1]["train/seconds/data"] == 0.1
    assert started[0]["id"] == started[1]["id"] and started[1]["resume"] == "allow"


def test_missing_wandb_is_refused_before_any_work(tiny, tmp_path, monkeypatch):
    without(monkeypatch, "wandb")
    config = tiny(runtime={"wandb": True})
    with pytest.raises(ValueError, match=r"runtime\.wandb=True needs wandb; pip install wandb, or leave it off"):
        train(config)
    assert not os.path.exists(config.out)


def test_a_terminal_shows_a_bar_with_rate_wait_and_time_left(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    writer = recorder(tmp_path)
    writer.progress(row(50))
    writer.say("a line")
    writer.close()
    shown = terminal.getvalue()
    assert "50/100" in shown and "1234 img/s" in shown and "data wait 25%" in shown
    assert "<" in shown  # tqdm's [passed<left, rate]


def test_a_plain_line_has_rate_wait_and_time_left(tmp_path, capsys):
    writer = recorder(tmp_path)
    writer.progress(row(40))
    writer.progress(row(41))  # too soon for another line
    writer.progress(row(100))
    writer.close()
    first, last = (line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch"))
    assert "step 40/100" in first and "1234 img/s" in first and "data wait 25%" in first and "left 0.5 min" in first
    assert "step 100/100" in last


def test_a_truncated_last_line_is_dropped(tmp_path):
    writer = recorder(tmp_path)
    writer.write(row(1))
    writer.write(row(2))
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    resumed = recorder(tmp_path, resumed_step=1)
    assert [found["step"] for found in resumed.earlier] == [1]
    resumed.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_a_full_disk_is_named(tmp_path):
    writer = recorder(tmp_path)
    writer._file.close()
    with Path("/dev/full").open("w") as writer._file:  # every write there finds no space
        message = r"No space left on device; free some disk space .*resume=auto: '.*metrics\.jsonl'"
        with pytest.raises(OSError, match=message):
            writer.write(row(1))
        writer.close()


def test_rows_have_the_time_of_each_part(tiny):
    found = train(tiny(max_steps=2, optim={"clip_grad": 1.0})).metrics
    assert found["seconds"].keys() == {
        *("data", "keys", "forward", "loss", "backward", "mix", "optimizer", "momentum", "enqueue")
    }
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert sum(found["seconds"].values()) <= 1.01 * found["seconds_per_step"]
    assert 0 < found["data_wait_share"] < 1
    assert found["images_per_second"] == pytest.approx(16 / found["seconds_per_step"])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        # The first row includes one-time work; the estimate uses the second.
        ([(10, 0.5), (20, 0.25)], "0.25 s per step: 17 min left for 4000 steps, until"),
        ([(10, 4.0), (20, 9.0)], "4 s per step: 4 h 27 min left for 4010 steps, until"),
        ([(4020, 9.0)], None),
    ],
)
def test_the_estimated_duration_is_printed_once(tmp_path, capsys, rows, said):
    writer = recorder(tmp_path, total_steps=4020)
    for step, seconds in rows + [(4000, 1.0)] * (said is not None):
        writer.progress(row(step, seconds_per_step=seconds))
    writer.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "per step:" in line]
    assert len(lines) == (said is not None)
    assert said is None or lines[0].startswith(said)
