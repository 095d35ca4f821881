"""The whole grid by its one command, at sizes smaller than the tiny scale's: by the same code, with other numbers."""

from __future__ import annotations

import csv
import dataclasses
import json
import time

import pytest

from fastuft.cli import main
from fastuft.config import EvalConfig, MethodConfig, ReproduceConfig
from fastuft.reproduce import recipes, runner, write_tiny_datasets
from fastuft.reproduce.recipes import TINY, Training
from fastuft.reproduce.runner import Grid, reproduce

pytestmark = pytest.mark.e2e

SHORT = Training(epochs=1, lr=0.05, batch_size=32)
MICRO = dataclasses.replace(
    TINY,
    train_sizes=dict.fromkeys(TINY.train_sizes, (200, 10)),
    caltech_per_class=20,
    source_size=248,
    pretraining=SHORT,
    scratch=SHORT,
    finetuning=SHORT,
    supervised=SHORT,
    method=MethodConfig(queue_size=64, key_momentum=0.9),
    evaluation=dataclasses.replace(TINY.evaluation, fewshot_epochs=1, semi_epochs=1, kmeans_restarts=1, tsne_points=40),
    write_data=lambda root: write_tiny_datasets(root, num_train=200, num_glyphs=248),
)


@pytest.fixture(scope="module")
def micro():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.SCALES, "tiny", MICRO)
        yield


@pytest.fixture(scope="module")
def finished(micro, tmp_path_factory):
    """The output folder of tables 3, 5, 6 and the text on Pet, with Figure 1, made by the command line."""
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


def test_the_tables_stand_beside_the_papers_figures(finished):
    with open(finished / "comparison.csv", newline="") as file:
        cells = {tuple(row[k] for k in ("table", "method", "dataset", "metric")): row for row in csv.DictReader(file)}
    ours = cells["6", "ours", "pet", "fewshot8"]
    assert ours["trials"] == "2" and float(ours["paper"]) == 79.88
    assert float(ours["difference"]) == pytest.approx(float(ours["mean"]) - 79.88, abs=0.011)
    page = (finished / "comparison.html").read_text()
    assert "not comparable with the paper" in page.replace("\n", " ")
    assert 'href="runs/unsupervised-resnet50-ours-pet-seed0"' in page
    assert "| ours | pet | fewshot8 |" in (finished / "comparison.md").read_text()
    figure = (finished / "figure1.html").read_text()
    assert all(name in figure for name in ("from scratch", "pretrained", "naive", "+ SDR + Mix"))


def test_the_same_command_again_only_reads(finished, micro):
    before = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*") if path.is_file()}
    began = time.perf_counter()
    config = ReproduceConfig(out=str(finished), tables=["6"], datasets=["pet"], trials=2, scale="tiny", figure=[])
    assert reproduce(config) == 0
    assert time.perf_counter() - began < 10
    after = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*") if path.is_file()}
    assert after == before


def test_reports_of_results(finished, micro, tmp_path, capsys):
    results = str(finished / "results.jsonl")
    assert main(["report", results, "--out", str(tmp_path / "page.html"), "--format", "markdown"]) == 0
    assert "| 6 | unsupervised | resnet50 | ours | pet | fewshot8 |" in capsys.readouterr().out
    assert (tmp_path / "page.html").exists() and (tmp_path / "page.csv").exists()


def test_another_recipe_in_the_same_folder_is_refused(finished, micro, capsys):
    other = dataclasses.replace(MICRO, finetuning=dataclasses.replace(SHORT, lr=0.01))
    config = ReproduceConfig(out=str(finished), tables=["6"], datasets=["pet"], trials=2, scale="tiny", figure=[])
    assert reproduce(config, other) > 0
    assert "holds a run with another optim" in capsys.readouterr().err


def test_tasks_of_an_array_share_the_work(micro, tmp_path, capsys):
    base = ReproduceConfig(
        out=str(tmp_path), tables=["1"], datasets=["pet", "caltech101"], trials=1, scale="tiny", figure=[], tasks=2
    )
    with pytest.raises(ValueError, match=r"tasks=2.*run stage=pretrain first"):
        reproduce(dataclasses.replace(base, stage="runs"))
    for task in range(2):
        assert reproduce(dataclasses.replace(base, stage="pretrain", task=task)) == 0
    shares = []
    for task in range(2):
        capsys.readouterr()
        assert reproduce(dataclasses.replace(base, stage="runs", task=task)) == 0
        shares.append({line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("[")})
    assert not shares[0] & shares[1] and len(shares[0] | shares[1]) == 5
    assert not (tmp_path / "results.jsonl").exists()
    assert reproduce(dataclasses.replace(base, stage="tables", tasks=1)) == 0
    assert len(rows_of(tmp_path)) == 3 * 2 * 3


def test_a_part_that_fails_leaves_the_others(micro, tmp_path, capsys, monkeypatch):
    evaluate = runner.evaluate_backbone

    def fail_once(backbone, config: EvalConfig):
        if "naive" in config.checkpoint:
            raise ValueError("features are not finite")
        return evaluate(backbone, config)

    monkeypatch.setattr(runner, "evaluate_backbone", fail_once)
    config = ReproduceConfig(out=str(tmp_path), tables=["1"], datasets=["pet"], trials=1, scale="tiny", figure=[])
    assert Grid(config).run() == 1
    assert "failed: unsupervised-resnet50-naive-pet-seed0 on pet: features are not finite" in capsys.readouterr().err
    assert {row["method"] for row in rows_of(tmp_path)} == {"unsup_S", "unsup_T"}
