"""The grid covers every published figure, and each leads to the right backbone, evaluation and value."""

from __future__ import annotations

import dataclasses
import re

import pytest

from fastuft.cli import main
from fastuft.cli.commands import COMMANDS
from fastuft.config import DATASETS, TABLES, ReproduceConfig, WeightsConfig
from fastuft.report import paper_figures
from fastuft.reproduce import grid, reproduce
from fastuft.reproduce.recipes import PAPER, RECIPES, TINY, train_config

ALL = grid.select_cells(TABLES, DATASETS)


def folders(backbone, scale):
    return train_config(backbone, scale, target="t", source="s", init="i", out="o")


def test_every_published_figure_is_a_cell():
    assert set(paper_figures()) < set(ALL)
    assert set(ALL) - set(paper_figures()) == set(grid.FORGETTING_OF_OURS)


def test_backbones_are_shared_between_tables():
    needed = grid.backbones(grid.measurements(ALL, [1], DATASETS, 1))
    kinds = [(b.pretraining, b.network, b.method) for b in needed]
    assert len(needed) == len(set(needed)) == 25
    assert kinds.count(("unsupervised", "resnet50", "ours")) == 4
    assert kinds.count(("unsupervised", "resnet50", "unsup_T")) == 2  # Table 1 has Pet and Caltech101 alone
    assert kinds.count(("supervised_bit", "resnet101", "ours")) == 4
    assert [b.method for b in needed[:3]] == ["unsup_S", "sup_S", "sup_S"]
    assert len({b.name for b in needed}) == 25


def test_a_measurement_covers_all_its_cells():
    found = {
        (m.backbone.method, m.dataset): m
        for m in grid.measurements(ALL, [1], DATASETS, 1)
        if m.backbone.pretraining == "unsupervised" or m.backbone.method == "sup_S"
    }
    ours, supervised = found["ours", "pet"], found["sup_S", "pet"]
    assert (ours.shots, ours.semi_shots, ours.source, ours.tsne) == ((1, 2, 4, 8), (2, 4, 8), True, True)
    assert (supervised.shots, supervised.semi_shots, supervised.source) == ((1, 2, 4, 8), (), False)
    assert not found["ours", "food101"].source
    assert found["unsup_S", "pet"].source and found["naive_sdr", "pet"].source


def test_seeds_repeat_trainings_but_not_the_pretrained_backbone():
    cells = [key for key in ALL if key[0] == "6" and key[4] == "pet"]
    needed = grid.backbones(grid.measurements(cells, [], DATASETS, 2))
    assert [(b.method, b.seed) for b in needed] == [
        ("unsup_S", 0),
        *[(method, seed) for seed in (0, 1) for method in ("naive", "naive_sdr", "ours")],
    ]


EVALUATION = {
    "retrieval": 0.7,
    "clustering": {"trials": [0.5, 0.6]},
    "forgetting": {"after": {"trials": [0.2, 0.3]}},
    "fewshot": {"8": {"top1": {"trials": [0.81]}, "mean_class": {"trials": [0.8]}}},
    "fixmatch": {"4": {"top1": {"trials": [0.91]}, "mean_class": {"trials": [0.9]}}},
}


@pytest.mark.parametrize(
    ("dataset", "metric", "accuracy", "expected"),
    [
        ("pet", "retrieval", "mean_class", [0.7]),
        ("pet", "cluster", "mean_class", [0.5, 0.6]),
        ("imagenet", "cluster", "mean_class", [0.2, 0.3]),
        ("pet", "fewshot8", "mean_class", [0.8]),
        ("food101", "fewshot8", "top1", [0.81]),
        ("food101", "semi4", "top1", [0.91]),
    ],
)
def test_cells_are_read_from_evaluations(dataset, metric, accuracy, expected):
    key = ("2", "unsupervised", "resnet50", "ours", dataset, metric)
    assert grid.values(key, EVALUATION, accuracy) == expected


def test_an_evaluation_without_a_cell_gives_no_value():
    for metric, dataset in (("fewshot1", "pet"), ("semi2", "pet"), ("cluster", "imagenet")):
        key = ("2", "unsupervised", "resnet50", "ours", dataset, metric)
        assert grid.values(key, {**EVALUATION, "forgetting": {}}, "mean_class") == []


def test_rows_number_trials_across_seeds():
    key = ("2", "unsupervised", "resnet50", "ours", "pet", "cluster")
    rows = grid.result_rows(key, {0: (EVALUATION, "a"), 1: (EVALUATION, "b")}, "mean_class")
    assert [(r["trial"], r["value"], r["run"]) for r in rows] == [
        (0, 50, "a"),
        (1, 60, "a"),
        (2, 50, "b"),
        (3, 60, "b"),
    ]


def test_recipes_have_the_papers_values():
    ours = folders(grid.Backbone("unsupervised", "resnet50", "ours", "pet"), PAPER)
    assert (ours.optim.lr, ours.data.batch_size, ours.optim.epochs) == (0.015, 256, 200)
    assert (ours.target, ours.source, ours.init, ours.method.mix) == ("t", "s", "i", "cutmix")
    assert ours.data.replay_fraction == 0.1 and ours.method.queue_size == 65536 and ours.method.temperature == 0.2
    naive = folders(grid.Backbone("unsupervised", "resnet50", "naive", "pet"), PAPER)
    assert (naive.source, naive.method.mix, naive.init) == (None, "none", "i")
    pretraining = folders(grid.Backbone("unsupervised", "resnet50", "unsup_S"), PAPER)
    assert (pretraining.optim.lr, pretraining.data.batch_size, pretraining.optim.epochs) == (0.24, 2048, 800)
    assert (pretraining.target, pretraining.init, pretraining.method.queue_prefill) == ("s", None, False)
    bit = folders(grid.Backbone("supervised_bit", "resnet101", "ours", "pet"), PAPER)
    assert bit.model.arch == "bit_resnet101"


def test_scales_differ_in_sizes_only():
    for method in RECIPES:
        paper, tiny = RECIPES[method](PAPER), RECIPES[method](TINY)
        assert dataclasses.replace(paper, training=tiny.training) == tiny


def quoted_figures(text):
    """(figures, metric names) by data set of the sentences ``Pet few-shot 9.08, 10.97 (K = 2, 4, 8)`` of a docstring."""
    numbers = {"Caltech101": "caltech101", "Pet": "pet"}
    for name, dataset in numbers.items():
        for sentence in re.findall(rf"{name} ([^;:]*)", text.replace("\n", " ")):
            yield dataset, [float(value) for value in re.findall(r"\d+\.\d+", sentence)]


@pytest.mark.parametrize("method", list(RECIPES))
def test_recipes_quote_published_figures_and_a_reproducing_command(method, monkeypatch):
    text = " ".join(RECIPES[method].__doc__.split())
    table = re.search(r"Table (\d)", text)[1]
    found = 0
    for dataset, figures in quoted_figures(text):
        row = {v for k, v in paper_figures().items() if (k[0], k[3], k[4]) == (table, method, dataset)}
        assert figures and set(figures) <= row, (dataset, figures)
        found += len(figures)
    assert found >= 3

    command = re.search(r"``([^`]*)``", text)[1].split()
    name, *options = command[command.index("fastuft" if command[0] == "fastuft" else "fastuft.cli") + 1 :]
    configs = []
    catching = dataclasses.replace(COMMANDS[name], run=lambda config: configs.append(config) or 0)
    monkeypatch.setitem(COMMANDS, name, catching)
    assert main([name, *options]) == 0
    (said,) = configs
    backbone = grid.Backbone("unsupervised", "resnet50", method, "" if method == "unsup_S" else "pet")
    recipe = folders(backbone, PAPER)
    assert (said.optim, said.data, said.method) == (recipe.optim, recipe.data, recipe.method)
    assert (said.source is None, said.init is None) == (recipe.source is None, recipe.init is None)
    assert said.target == ("imagenet/train" if recipe.target == "s" else "pets/train")


def test_tables_run_all_their_trials_by_default():
    config = ReproduceConfig()
    assert (config.trials, config.tables, config.figure, config.datasets) == (3, list(TABLES), [1], list(DATASETS))
    evaluation = PAPER.evaluation
    assert (evaluation.fewshot.epochs, evaluation.fewshot.lr, evaluation.fewshot.backbone_lr) == (30, 3.0, 1e-4)
    assert (evaluation.semi.epochs, evaluation.semi.batch_size) == (30, 64)


def test_dry_run_needs_no_data_and_shows_hours_only_from_a_rate(capsys, tmp_path):
    config = ReproduceConfig(out=str(tmp_path / "grid"), dry_run=True, tables=["2"], datasets=["pet"], figure=[])
    assert reproduce(config) == 0
    plan = capsys.readouterr().out
    assert "train unsupervised-resnet50-ours-pet-seed0" in plan and "hours" not in plan
    # (3680 + 128117) // 256 steps of 256, 200 times
    line = next(line for line in plan.splitlines() if "ours-pet" in line and line.startswith("train"))
    assert line.split()[2:] == ["131,797", "200", "102,800", "26,316,800", "to", "do"]
    reproduce(dataclasses.replace(config, rate=1000.0))
    line = next(x for x in capsys.readouterr().out.splitlines() if "ours-pet" in x and x.startswith("train"))
    assert line.split()[-3] == "7.3"
    # Few-shot finetuning alone: 3 trials of 30 epochs of 37 (1 + 2 + 4 + 8) images, in 1, 1, 1 and 2 batches.
    assert next(x for x in plan.splitlines() if x.startswith("evaluate") and "ours-pet" in x).split()[4:7] == [
        "3,680",
        "450",
        "49,950",
    ]
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "data is missing; name the folder with oxford-iiit-pet/"),
        ({"data": "nowhere"}, "oxford-iiit-pet.*does not exist.*Download"),
        (
            {"weights": WeightsConfig(unsupervised_resnet50="gone.pth")},
            "unsupervised_resnet50='gone.pth' does not exist",
        ),
        ({"tables": ["3"]}, r"BiT-S-R50x1\.npz"),
        ({"tables": []}, "no cell in common"),
    ],
)
def test_missing_inputs_are_named_before_anything_runs(tmp_path, changes, words):
    base = ReproduceConfig(out=str(tmp_path / "grid"), tables=["2"], datasets=["pet"], figure=[])
    with pytest.raises(ValueError, match=words):
        reproduce(dataclasses.replace(base, **changes))
    assert not (tmp_path / "grid").exists()


def test_starting_under_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"without torchrun, once per machine"):
        reproduce(ReproduceConfig(out=str(tmp_path / "grid"), scale="tiny"))
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tables": ["7"]}, "tables='7'"),
        ({"figure": [2]}, "figure=2"),
        ({"datasets": ["cars"]}, "datasets='cars'"),
        ({"task": 4, "tasks": 4}, r"task=4.*\[0, 3\]"),
        ({"trials": 0}, "trials=0"),
        ({"rate": 0.0}, "rate=0.0"),
    ],
)
def test_impossible_configurations_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ReproduceConfig(**options)
