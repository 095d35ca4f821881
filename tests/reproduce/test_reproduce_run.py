"""The whole grid through its command, with sizes below those of the tiny scale."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import micro_grid
import pytest
from micro_grid import MICRO, SHORT

from fastuft.cli import main
from fastuft.config import EvalConfig, ReproduceConfig, WeightsConfig
from fastuft.reproduce import measuring, recipes, reproduce, training
from fastuft.reproduce.claims import claim
from fastuft.reproduce.folders import GridFolders
from fastuft.reproduce.plan import make_plan, plan_table
from fastuft.reproduce.runner import run_plan
from fastuft.trainer import EXIT_PREEMPTED

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def micro():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.SCALES, "tiny", MICRO)
        yield


@pytest.fixture(scope="module")
def finished(micro, tmp_path_factory):
    """The output folder of tables 3, 5, 6 and the text for Pet, with Figure 1, written by the command line."""
    out = tmp_path_factory.mktemp("grid")
    options = ["--tables", "3,5,6,text", "--datasets", "pet", "--trials", "2", "--scale", "tiny", "--out", str(out)]
    assert main(["reproduce", *options]) == 0
    return out


def rows_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_cell_has_its_trials(finished):
    found = {}
    for row in rows_of(finished):
        found.setdefault((row["table"], row["method"], row["dataset"], row["metric"]), []).append(row)
    assert len(found) == 2 * 4 + 2 * 3 + 4 * 3 + 4 * 2  # tables 3, 5, 6 and the text with the full method's forgetting
    assert {len(rows) for rows in found.values()} == {2}
    assert all(0 <= row["value"] <= 100 for rows in found.values() for row in rows)


def test_the_tables_show_the_papers_figures_too(finished):
    with open(finished / "comparison.csv", newline="") as file:
        cells = {tuple(row[k] for k in ("table", "method", "dataset", "metric")): row for row in csv.DictReader(file)}
    ours = cells["6", "ours", "pet", "fewshot8"]
    assert ours["trials"] == "2" and float(ours["paper"]) == 79.88
    assert float(ours["difference"]) == pytest.approx(float(ours["mean"]) - 79.88, abs=0.011)
    page = (finished / "comparison.html").read_text()
    assert "not comparable with the paper" in page.replace("\n", " ")
    assert 'href="runs/unsupervised-resnet50-ours-pet-seed0"' in page
    assert "| ours | pet | fewshot8 | [" in (finished / "comparison.md").read_text()
    linked = {
        *re.findall(r'href="(runs/[^"]*)"', page),
        *re.findall(r"<(runs/[^>]*)>", (finished / "comparison.md").read_text()),
    }
    assert len(linked) == 6 and all((finished / link / "backbone.safetensors").exists() for link in linked)
    figure = (finished / "figure1.html").read_text()
    assert all(name in figure for name in ("from scratch", "pretrained", "naive", "+ SDR + Mix"))


def test_repeating_the_command_only_reads(finished, micro):
    before = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*") if path.is_file()}
    began = time.perf_counter()
    config = ReproduceConfig(out=str(finished), tables=["6"], datasets=["pet"], trials=2, scale="tiny", figure=[])
    assert reproduce(config) == 0
    assert time.perf_counter() - began < 10
    after = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*") if path.is_file()}
    assert after == before


def test_a_results_file_has_a_report(finished, micro, tmp_path, capsys):
    results = str(finished / "results.jsonl")
    assert main(["report", results, "--out", str(tmp_path / "page.html"), "--format", "markdown"]) == 0
    assert "| 6 | unsupervised | resnet50 | ours | pet | fewshot8 |" in capsys.readouterr().out
    assert (tmp_path / "page.html").exists() and (tmp_path / "page.csv").exists()


def test_another_recipe_in_the_same_folder_is_refused(finished, micro, capsys):
    other = dataclasses.replace(MICRO, finetuning=dataclasses.replace(SHORT, lr=0.01))
    config = ReproduceConfig(out=str(finished), tables=["6"], datasets=["pet"], trials=2, scale="tiny", figure=[])
    assert reproduce(config, other) > 0
    assert "has a run with another optim" in capsys.readouterr().err


def test_cells_missing_from_an_earlier_evaluation_are_measured(finished, micro, tmp_path):
    """Table 2 needs one-shot runs, which Table 6 does without."""
    shutil.copytree(finished, tmp_path / "grid")
    file = tmp_path / "grid" / "runs" / "unsupervised-resnet50-naive-pet-seed0" / "eval-pet" / "eval.json"
    assert "1" not in json.loads(file.read_text())["fewshot"]
    options = {"tables": ["2"], "datasets": ["pet"], "trials": 2, "scale": "tiny", "figure": [], "stage": "tables"}
    assert reproduce(ReproduceConfig(out=str(tmp_path / "grid"), **options)) == 0
    assert {row["metric"] for row in rows_of(tmp_path / "grid") if row["method"] == "naive"} == {
        "fewshot2",
        "fewshot4",
        "fewshot8",
        "retrieval",
        "cluster",
    }


def test_a_changed_checkpoint_is_evaluated_again(finished, micro, tmp_path):
    weights = tmp_path / "weights.safetensors"
    pretrained = finished / "runs" / "unsupervised-resnet50-unsup_S-seed0" / "backbone.safetensors"
    other = finished / "runs" / "unsupervised-resnet50-naive-pet-seed0" / "backbone.safetensors"
    config = ReproduceConfig(
        out=str(tmp_path / "grid"),
        tables=["1"],
        datasets=["pet"],
        trials=1,
        scale="tiny",
        figure=[],
        weights=WeightsConfig(unsupervised_resnet50=str(weights)),
    )
    plan = make_plan(config)
    measurements = tuple(m for m in plan.measurements if m.backbone.method == "unsup_S")
    plan = dataclasses.replace(plan, measurements=measurements, backbones=tuple(m.backbone for m in measurements))
    file = tmp_path / "grid" / "runs" / "unsupervised-resnet50-unsup_S-seed0" / "eval-pet" / "eval.json"
    hashes = []
    for source in (pretrained, other):
        shutil.copy(source, weights)
        assert run_plan(plan, config, MICRO, GridFolders(tmp_path / "grid", config.weights)) == 0
        hashes.append(json.loads(file.read_text())["backbone"]["hash"])
    assert hashes[0] != hashes[1]


def test_array_tasks_share_the_work(micro, tmp_path, capsys):
    base = ReproduceConfig(
        out=str(tmp_path), tables=["1"], datasets=["pet", "caltech101"], trials=1, scale="tiny", figure=[], tasks=2
    )
    with pytest.raises(ValueError, match=r"tasks=2.*run stage=pretrain first"):
        reproduce(dataclasses.replace(base, stage="runs"))
    for task in range(2):
        assert reproduce(dataclasses.replace(base, stage="pretrain", task=task)) == 0

    def trained_by(task):
        capsys.readouterr()
        assert reproduce(dataclasses.replace(base, stage="runs", task=task)) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
        return [line[1].rstrip(":") for line in lines if line[-1] == "training"], [
            line[1].rstrip(":") for line in lines if line[-1] == "it"
        ]

    others = "unsupervised-resnet50-naive-caltech101-seed0", "unsupervised-resnet50-unsup_T-pet-seed0"
    with claim(tmp_path, others[0]), claim(tmp_path, others[1]):  # as if two other tasks worked on them
        trained, skipped = trained_by(0)
    assert sorted(skipped) == sorted(others) and len(trained) == 2 and not {*trained} & {*others}
    assert sorted(trained_by(1)[0]) == sorted(others)  # those tasks have ended, so one takes over their work
    assert trained_by(0) == ([], [])
    assert not (tmp_path / "results.jsonl").exists()
    assert reproduce(dataclasses.replace(base, stage="tables", tasks=1)) == 0
    assert len(rows_of(tmp_path)) == 3 * 2 * 3


def test_concurrent_processes_repeat_no_work(tmp_path):
    command = [sys.executable, micro_grid.__file__, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    trained = [line.split()[1] for out, _ in results for line in out.splitlines() if line.startswith("trained ")]
    assert sorted(Path(folder).name for folder in trained) == [
        "unsupervised-resnet50-naive-pet-seed0",
        "unsupervised-resnet50-unsup_S-seed0",
        "unsupervised-resnet50-unsup_T-pet-seed0",
    ]


def test_a_task_of_a_process_that_ended_is_taken_over(micro, tmp_path, monkeypatch, capsys):
    config = ReproduceConfig(out=str(tmp_path), tables=["1"], datasets=["pet"], trials=1, scale="tiny", figure=[])
    first, second = [backbone.name for backbone in make_plan(config).backbones if backbone.method != "unsup_S"]
    train, order = training.train, []
    with ExitStack() as other:
        other.enter_context(claim(tmp_path, first))  # as another process holds it

        def train_while_the_other_ends(config):
            order.append(Path(config.out).name)
            if order[-1] == second:
                other.close()
            return train(config)

        monkeypatch.setattr(training, "train", train_while_the_other_ends)
        assert reproduce(config) == 0
    assert order[1:] == [second, first]
    assert "another process is working" not in capsys.readouterr().out
    assert {row["method"] for row in rows_of(tmp_path)} == {"unsup_S", "naive", "unsup_T"}


def test_a_killed_process_leaves_the_rest_to_the_other(tmp_path):
    epochs = 24
    command = [sys.executable, micro_grid.__file__, str(tmp_path), "all", "1", str(epochs)]
    run = tmp_path / "runs" / "unsupervised-resnet50-unsup_S-seed0"

    def start():
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    killed = start()
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    survivor = start()
    time.sleep(1)
    killed.kill()
    killed.communicate()
    out, err = survivor.communicate(timeout=400)
    assert survivor.returncode == 0, (out, err)
    trained = [Path(line.split()[1]).name for line in out.splitlines() if line.startswith("trained ")]
    assert trained[0] == run.name and len(trained) == 3
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] and summary["steps"] == epochs * (248 // 32)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == summary["steps"]
    assert {row["method"] for row in rows_of(tmp_path)} == {"unsup_S", "naive", "unsup_T"}


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import sys, pathlib\nfrom fastuft.reproduce.claims import claim\n"
    code += (
        "with claim(pathlib.Path(sys.argv[1]), 'part') as alone:\n    print(alone, flush=True)\n    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    with claim(tmp_path, "part") as alone:
        assert not alone
    with claim(tmp_path, "another part") as alone:
        assert alone
    process.kill()
    process.communicate()
    with claim(tmp_path, "part") as alone:
        assert alone


def test_stopping_the_command_stops_all_its_processes(tmp_path):
    command = [sys.executable, micro_grid.__file__, str(tmp_path), "pretrain", "2"]
    run = tmp_path / "runs" / "unsupervised-resnet50-unsup_S-seed0"
    process = subprocess.Popen([*command, "5000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_PREEMPTED, (out, err)
    assert "stopped by SIGTERM; the same command continues" in err
    assert list((run / "checkpoints").iterdir())
    # The backbone of the last step is there, but the training is not done.
    assert (run / "backbone.safetensors").exists()
    config = ReproduceConfig(out=str(tmp_path), tables=["1"], datasets=["pet"], scale="tiny", figure=[])
    table = plan_table(make_plan(config), MICRO, GridFolders(tmp_path, config.weights), trials=1, rate=None)
    plan = table.text().splitlines()
    assert next(line for line in plan if line.startswith(f"train {run.name}")).endswith("to do")


def test_a_training_can_run_in_two_processes(tmp_path):
    command = [sys.executable, micro_grid.__file__, str(tmp_path), "pretrain", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done
    run = tmp_path / "runs" / "unsupervised-resnet50-unsup_S-seed0"
    assert (run / "backbone.safetensors").exists()
    assert "trained" not in done.stdout  # by torchrun's processes, not by this one


def test_a_stopped_training_ends_the_command(micro, tmp_path, capsys, monkeypatch):
    stopped = dataclasses.make_dataclass("Stopped", ["interrupted"])("SIGTERM")
    monkeypatch.setattr(training, "train", lambda config: stopped)
    config = ReproduceConfig(out=str(tmp_path), tables=["1"], datasets=["pet"], trials=1, scale="tiny", figure=[])
    with pytest.raises(SystemExit) as ended:
        reproduce(config)
    assert ended.value.code == EXIT_PREEMPTED
    assert "stopped by SIGTERM; the same command continues" in capsys.readouterr().err


def test_a_failed_task_leaves_the_others(micro, tmp_path, capsys, monkeypatch):
    evaluate = measuring.evaluate_backbone

    def fail_once(backbone, config: EvalConfig):
        if "naive" in config.checkpoint:
            raise ValueError("features are not finite")
        return evaluate(backbone, config)

    monkeypatch.setattr(measuring, "evaluate_backbone", fail_once)
    config = ReproduceConfig(out=str(tmp_path), tables=["1"], datasets=["pet"], trials=1, scale="tiny", figure=[])
    assert reproduce(config) == 1
    assert "failed: unsupervised-resnet50-naive-pet-seed0 on pet: features are not finite" in capsys.readouterr().err
    assert {row["method"] for row in rows_of(tmp_path)} == {"unsup_S", "unsup_T"}
