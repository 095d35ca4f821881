"""A sweep keeps finished runs, adds labels to every look, and the verdict's report reads it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from bench_scripts import script
from PIL import Image

from fastuft.model import build_backbone, export_backbone


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Train and test folders with two classes of colors, and a source without classes."""
    root = tmp_path_factory.mktemp("sweep")
    for name, count in (("train", 24), ("test", 8), ("source", 16)):
        for index in range(count):
            generator = np.random.default_rng([index, count])
            pixels = generator.integers(0, 200, (4, 4, 3)) + np.array([55, 0, 0] if index % 2 else [0, 0, 55])
            path = root / name / (f"class{index % 2}" if name != "source" else "") / f"{index:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).resize((40, 40), Image.Resampling.BICUBIC).save(path)
    torch.manual_seed(0)
    export_backbone(build_backbone("resnet_tiny", "small"), root / "start.safetensors")
    sweep = {
        "common": {
            "model": {"arch": "resnet_tiny", "stem": "small", "head_dim": 8},
            "augment": {"size": 32},
            "data": {"loader": "torch", "threads": 1},
            "optim": {"epochs": 2},
            "verdict": {"looks": 2},
            "fewshot": {"epochs": 2},
            "resize": 33,
        },
        "settings": {"naive": {"source": False, "method": {"mix": "none"}}, "half": {"images": 0.5}},
    }
    (root / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return root


def test_a_sweep_resumes_and_its_looks_have_labels(folders, tmp_path, monkeypatch, capsys):
    sweep = script("sweep")
    arguments = ["sweep.py", str(folders / "sweep.yaml"), "--init", str(folders / "start.safetensors")]
    for name in ("train", "test", "source"):
        arguments += [f"--{name}", str(folders / name)]
    arguments += ["--out", str(tmp_path), "--shots", "1", "--only"]
    used, fewshot = [], sweep.fewshot
    monkeypatch.setattr(
        sweep, "fewshot", lambda *a, **k: used.append((k["config"].epochs, k["resize"])) or fewshot(*a, **k)
    )
    monkeypatch.setattr(sys, "argv", [*arguments, "naive"])
    sweep.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "naive", "half"])
    before = (tmp_path / "naive-0" / "result.json").read_bytes()
    sweep.main()
    assert (tmp_path / "naive-0" / "result.json").read_bytes() == before
    start, half, naive = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert (start["setting"], half["setting"], naive["setting"]) == ("start", "half", "naive")
    assert naive["options"]["source"] is False and len(half["looks"]) == 3
    assert half["looks"][0]["labels"] == start["looks"][0]["labels"]
    for look in half["looks"]:
        assert 0 <= look["labels"]["retrieval"] <= 100 and look["view_agreement"] is not None
        assert 50 <= look["labels"]["class_means"]["1"] <= 100  # two classes that differ in color
    assert set(half["looks"][-1]["labels"]["fewshot"]) == {"1"} and "fewshot" not in half["looks"][1]["labels"]
    assert used == [(2, 33)] * 3  # start, naive and half: the same options for all
    assert len((tmp_path / "target_0.5.txt").read_text().splitlines()) == 12
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert "| setting | seed | step | retrieval | clustering | 1-shot means | 1-shot | minutes | verdict |" in lines
    ends = dict(zip(("start", "half", "naive"), lines[4:7], strict=True))
    for run in (start, half, naive):
        labels = run["looks"][-1]["labels"]
        wanted = f"{labels['class_means']['1']:.1f} | {labels['fewshot']['1']:.1f}{'?' * len(labels['unsettled'])} |"
        assert wanted in ends[run["setting"]], ends
    assert not (tmp_path / "naive-0" / "run" / "checkpoints").exists()

    verdict = script("verdict")
    monkeypatch.setattr(sys, "argv", ["verdict.py", *(f"{n}={tmp_path / 'sweep.json'}" for n in ("one", "two", "two"))])
    capsys.readouterr()
    verdict.main()
    said = capsys.readouterr().out
    assert (
        "| view agreement | " in said
        and "one, whole runs: fitted on the others" in said
        and "| two: naive-0 to " in said
    )
    counts = {line.split(":")[0]: line.split(" | ")[1] for line in said.splitlines() if ", whole runs: in use" in line}
    assert counts == {"| one, whole runs": "2", "| two, whole runs": "4"}


def test_few_shot_accuracies_that_did_not_converge_are_marked():
    sweep = script("sweep")
    labels = {"fewshot": {"1": 40.0, "2": 60.0}, "unsettled": ["1"]}
    row = sweep.cells({"setting": "naive", "seed": 1}, {"step": 3, "labels": labels}, ["1"], ["1", "2", "4"])
    assert row == ["naive", "1", "3", "", "", "", "40.0?", "60.0", ""]


def test_an_unknown_setting_is_refused(folders, tmp_path, monkeypatch, capsys):
    sweep = script("sweep")
    given = ["sweep.py", str(folders / "sweep.yaml"), "--init", "i", "--train", "a", "--test", "b", "--source", "c"]
    monkeypatch.setattr(sys, "argv", [*given, "--out", str(tmp_path), "--only", "nothing"])
    with pytest.raises(SystemExit):
        sweep.main()
    assert "nothing not among half, naive" in capsys.readouterr().err


def looks(verdict, gains):
    """A run whose retrieval and view agreement change in proportion."""
    found = [
        verdict.Look(step, 256, 40.0, 20.0, -2.0 - 0.5 * (step > 0), 0.3, 0.5 + gain / 50)
        for step, gain in enumerate([0.0, *gains])
    ]
    labels = np.array([[50 + gain, 50 + gain] for gain in (0.0, *gains)])
    return verdict.Run("run", found, labels, np.where(labels[:, 0] < 56, labels[:, 0], np.nan))


def test_correlation_and_regret_equal_their_definitions():
    verdict = script("verdict")
    assert verdict.correlation([1, 2, 3], [10, 20, 25]) == pytest.approx(1.0)
    assert verdict.correlation([1, 1, 2], [3, 3, 1]) == pytest.approx(-1.0)
    assert np.isnan(verdict.correlation([1, 1], [1, 2]))
    runs = [looks(verdict, (-3.0, 6.0, 4.0))]
    found = verdict.correlations(runs)
    assert found["view_agreement"] == pytest.approx([1.0, 1.0, 1.0]) and np.isnan(found["lidar"][0])
    told = verdict.outcome(runs[0], verdict.Rule())
    assert (told.said, told.best, told.exported, told.end) == ("better", 6.0, 6.0, 4.0)
    lost = verdict.outcome(looks(verdict, (-8.0, -9.0)), verdict.Rule())
    assert (lost.said, lost.best, lost.exported) == ("no better", 0.0, 0.0)


def test_exporting_harm_costs_more_than_saying_nothing():
    verdict = script("verdict")
    good, bad = looks(verdict, (8.0,)), looks(verdict, (5.0, 0.0))
    bad.labels[1] = 40.0  # views agree, labels do not
    assert verdict.fitted([good, bad]).agreement_gain == 0.5


def test_the_report_counts_whole_runs_and_runs_that_end_at_each_look():
    verdict = script("verdict")
    lines = verdict.report({"one": [looks(verdict, (-3.0, 6.0, 7.0))], "other": [looks(verdict, (8.0,))]}).splitlines()
    counts = {line.split(":")[0]: line.split("|")[2:4] for line in lines if ": in use" in line}
    assert counts["| one, whole runs"] == [" 1 ", " 1 of 1 "]
    assert counts["| one, ended at each look"] == [" 3 ", " 2 of 2 "]
