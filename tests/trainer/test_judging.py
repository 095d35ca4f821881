"""The verdict at the end of a run: the exported weights, the records, and resuming."""

from __future__ import annotations

import json
import os
import signal
import warnings

import pytest
from run_results import rows, same_weights

from fastuft.evaluate import Verdict
from fastuft.runfolder import RunFolder
from fastuft.trainer import Callbacks, judging, train
from fastuft.trainer import run as judging_run

pytestmark = pytest.mark.filterwarnings("ignore:method.queue_size")


@pytest.fixture
def judged_as(monkeypatch):
    """Make every verdict this outcome, with the best step so far."""

    def install(outcome):
        def judge(looks):
            best = judging.best_look(looks)
            step = {"better": best.step if best else 0, "not known": looks[-1].step}.get(outcome, 0)
            return Verdict(outcome, step, "as the test has it")

        monkeypatch.setattr(judging, "judge", judge)

    return install


def test_a_finetuning_reports_its_verdict_everywhere(tiny, start, capsys):
    result = train(tiny(init=start, verdict={"looks": 2}))
    folder = RunFolder(result.run_dir)
    looks = rows(result.run_dir, "look")
    assert [row["step"] for row in looks] == [0, 4, 8]
    assert looks[0]["neighbors_kept"] == 1.0 and looks[2]["source_cka"] < 1.0
    said = folder.read_summary()["verdict"]
    assert said["line"] in capsys.readouterr().out and said["exported"] == "last"
    assert said["line"] == result.judgment.line() and said["outcome"] == result.judgment.verdict.outcome
    assert said["start"]["step"] == 0 and said["end"]["step"] == 8 and said["seconds"] > 0
    assert not folder.last_file.exists() and not folder.start_file.exists()
    assert same_weights(folder.backbone_file, folder.checkpoints.path(8))


@pytest.mark.parametrize(
    ("outcome", "exported"),
    [("better", "judged"), ("no better", "start"), ("collapsed", "start"), ("not known", "last")],
)
def test_the_judged_backbone_is_the_exported_one(tiny, start, judged_as, outcome, exported):
    judged_as(outcome)
    result = train(tiny(init=start, select="judged", verdict={"looks": 2}))
    folder = RunFolder(result.run_dir)
    assert result.judgment.exported == exported
    files = {
        "start": start,
        "last": folder.checkpoints.path(8),
        "judged": folder.judged_file(result.judgment.verdict.step),
    }
    assert same_weights(folder.backbone_file, files[exported])
    assert same_weights(folder.last_file, folder.checkpoints.path(8))
    assert folder.weights_file() == folder.weights_file(backbone_first=True) == folder.backbone_file
    assert len(folder.judged_files()) == 1
    assert folder.read_summary()["verdict"]["exported"] == exported


def test_the_best_checkpoint_is_kept_until_a_better_one(tiny, start, monkeypatch, judged_as):
    judged_as("better")
    agreements = iter([0.1, 0.3, 0.2, 0.4, 0.35])
    look_at = judging.look_at
    monkeypatch.setattr(
        judging,
        "look_at",
        lambda *arguments: judging.Look(
            **{
                **judging.asdict(look_at(*arguments)),
                "view_agreement": next(agreements),
                "effective_rank": 10.0,
                "uniformity": -2.0,
            }
        ),
    )
    result = train(tiny(init=start, select="judged", verdict={"looks": 4}, runtime={"keep_every": 2}))
    folder = RunFolder(result.run_dir)
    assert [file.name for file in folder.judged_files()] == ["judged_00000006.safetensors"]
    assert result.judgment.verdict.step == 6 and same_weights(folder.backbone_file, folder.checkpoints.path(6))


def test_a_run_ended_by_its_verdict_stays_ended_on_resume(tiny, start, monkeypatch):
    monkeypatch.setattr(judging, "should_stop", lambda looks: len(looks) == 2)
    config = {"init": start, "stop": "judged", "verdict": {"looks": 4}}
    result = train(tiny(**config))
    assert (result.steps, result.finished, result.interrupted) == (2, True, None)
    assert RunFolder(result.run_dir).read_summary()["finished"]
    assert train(tiny(**config, resume="auto")).steps == 2


def test_a_resumed_run_has_the_same_looks_and_verdict(tiny, start, tmp_path):
    def stop(progress):
        if progress.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    config = {"init": start, "select": "judged", "verdict": {"looks": 4}}
    whole = train(tiny(**config, out=str(tmp_path / "whole")))
    stopped = train(tiny(**config), Callbacks(on_step=stop))
    assert stopped.interrupted == "SIGTERM" and stopped.steps == 5
    resumed = train(tiny(**config, resume="auto"))
    assert rows(resumed.run_dir, "look") == rows(whole.run_dir, "look")
    assert resumed.judgment.line() == whole.judgment.line()
    assert same_weights(resumed.run_dir / "backbone.safetensors", whole.run_dir / "backbone.safetensors")


def test_a_run_stopped_before_its_first_step_exports_nothing_and_restarts(tiny, start, monkeypatch):
    fill = judging_run.prefill

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return fill(*arguments)

    monkeypatch.setattr(judging_run, "prefill", stopped)
    config = {"init": start, "select": "judged", "verdict": {"looks": 2}}
    result = train(tiny(**config))
    assert (result.interrupted, result.steps) == ("SIGTERM", 0)
    assert not RunFolder(result.run_dir).has_weights
    monkeypatch.undo()
    assert train(tiny(**config, resume="auto")).finished


def test_a_look_missed_by_a_kill_is_taken_on_resume(tiny, start):
    config = {"init": start, "select": "judged", "verdict": {"looks": 2}}
    folder = RunFolder(train(tiny(**config)).run_dir)
    lines = folder.metrics_file.read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] != "look" or json.loads(line)["step"] < 8]
    folder.metrics_file.write_text("\n".join(kept) + "\n")
    train(tiny(**config, resume="auto"))
    assert [row["step"] for row in rows(folder.path, "look")] == [0, 4, 8]


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_without_start_features_the_other_measures_remain(tiny, start, content):
    config = {"init": start, "verdict": {"looks": 2}}
    folder = RunFolder(train(tiny(**config, max_steps=4)).run_dir)
    folder.start_features_file.unlink()
    if content is not None:
        folder.start_features_file.write_bytes(content)
    train(tiny(**config, resume="auto"))
    last = rows(folder.path, "look")[-1]
    assert last["neighbors_kept"] is None and last["source_cka"] is None and last["effective_rank"] > 0


def test_looks_do_not_change_training(tiny, start, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_looks = train(tiny(init=start, verdict={"looks": 4}))
        without = train(tiny(init=start, verdict={"looks": 0}, out=str(tmp_path / "without")))
    assert without.judgment is None and RunFolder(without.run_dir).read_summary()["verdict"] is None
    assert rows(with_looks.run_dir, "train") == rows(without.run_dir, "train")


@pytest.mark.parametrize("changes", [{"select": "judged"}, {"stop": "judged"}])
def test_a_verdict_needs_an_initialization_and_looks(tiny, start, changes):
    with pytest.raises(ValueError, match="a verdict compares with the start; set init"):
        tiny(**changes)
    with pytest.raises(ValueError, match=r"verdict\.looks"):
        tiny(init=start, verdict={"looks": 0}, **changes)
