"""The paper's tables as a grid: cells (one published figure each), and the backbones and evaluations that they need.

The cells are the keys of the packaged figures of the paper, so nothing about a table is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastuft.report import Key, paper_figures

PRETRAINED = ("unsup_S", "sup_S")  # methods that evaluate a pretrained backbone unchanged
SOURCE = "imagenet"
# The text quotes clustering of the source beside that of Pet, so its backbones are those finetuned on Pet.
FORGETTING_TARGET = "pet"
# "With SDR" may mean SDR and Mix in the text (its figure for Pet is that of the full method in Table 2), so both are measured.
FORGETTING_OF_OURS: tuple[Key, ...] = (
    ("text", "unsupervised", "resnet50", "ours", SOURCE, "cluster"),
    ("text", "unsupervised", "resnet50", "ours", FORGETTING_TARGET, "cluster"),
)
# Figure 1: t-SNE of one target's features from scratch, pretrained, naive and with replaying; we add the full method.
FIGURE_1_TARGET = "pet"
FIGURE_1 = {
    "from scratch": "unsup_T",
    "pretrained": "unsup_S",
    "naive": "naive",
    "+ SDR": "naive_sdr",
    "+ SDR + Mix": "ours",
}


@dataclass(frozen=True, order=True)
class Backbone:
    """One set of weights: a pretrained one, or one trained on a data set's training images.

    Args:
        pretraining: unsupervised or supervised_bit.
        network: resnet50 or resnet101, as in the paper's tables.
        method: unsup_S and sup_S (as pretrained), unsup_T (from scratch), naive, naive_sdr or ours.
        dataset: the target; empty for a pretrained backbone, which is used for every data set.
        seed: seed of its training.
    """

    pretraining: str
    network: str
    method: str
    dataset: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        """Folder name."""
        parts = (self.pretraining, self.network, self.method, self.dataset)
        return "-".join([part for part in parts if part] + [f"seed{self.seed}"])

    @property
    def pretrained(self) -> Backbone:
        """The backbone that training starts from (itself, for a pretrained backbone)."""
        return Backbone(self.pretraining, self.network, "unsup_S" if self.pretraining == "unsupervised" else "sup_S")


@dataclass(frozen=True)
class Measurement:
    """The evaluation of one backbone on one data set.

    Args:
        backbone: the backbone to evaluate.
        dataset: the data set to evaluate it on.
        seed: seed of draws and starts.
        shots: labeled images per class of the few-shot runs.
        semi_shots: labeled images per class of the FixMatch runs.
        source: whether to cluster the source too.
        tsne: whether to make a t-SNE map.
    """

    backbone: Backbone
    dataset: str
    seed: int
    shots: tuple[int, ...] = ()
    semi_shots: tuple[int, ...] = ()
    source: bool = False
    tsne: bool = False


def select_cells(tables: Iterable[str], datasets: Iterable[str]) -> list[Key]:
    """The cells of the named tables and data sets, in the paper's order."""
    wanted, targets = list(tables), list(datasets)
    cells = [*paper_figures(), *FORGETTING_OF_OURS]
    return [key for key in cells if key[0] in wanted and _training_of(key)[1] in targets]


def _training_of(key: Key) -> tuple[str, str]:
    """(method, target data set) of a cell's training."""
    _, _, _, method, dataset, _ = key
    return method, FORGETTING_TARGET if dataset == SOURCE else dataset


def _backbone(key: Key, seed: int) -> Backbone:
    method, dataset = _training_of(key)
    if method in PRETRAINED:
        return Backbone(key[1], key[2], method)
    return Backbone(key[1], key[2], method, dataset, seed)


def _metric(key: Key) -> tuple[str, int]:
    """(fewshot, K), (semi, K), (retrieval, 0) or (cluster, 0)."""
    found = re.fullmatch(r"([a-z]+)(\d*)", key[5])
    assert found is not None, f"metric of {key}"
    return found[1], int(found[2] or 0)


def measurements(cells: Iterable[Key], plots: Iterable[int], datasets: Iterable[str], seeds: int) -> list[Measurement]:
    """Every evaluation that cells and plots need, once each, with everything that it must measure."""
    wanted: dict[tuple[Backbone, str, int], list[Key]] = {}
    mapped: set[Backbone] = set()
    for seed in range(seeds):
        for key in cells:
            measured = (_backbone(key, seed), _training_of(key)[1], seed)
            wanted.setdefault(measured, []).append(key)
    if 1 in plots and FIGURE_1_TARGET in datasets:
        for method in FIGURE_1.values():
            backbone = figure_backbone(method)
            mapped.add(backbone)
            wanted.setdefault((backbone, FIGURE_1_TARGET, 0), [])
    result = []
    for (backbone, dataset, seed), keys in wanted.items():
        metrics = [_metric(key) for key in keys]
        result.append(
            Measurement(
                backbone,
                dataset,
                seed,
                shots=tuple(sorted({k for kind, k in metrics if kind == "fewshot"})),
                semi_shots=tuple(sorted({k for kind, k in metrics if kind == "semi"})),
                source=any(key[4] == SOURCE for key in keys),
                tsne=backbone in mapped and dataset == FIGURE_1_TARGET and seed == 0,
            )
        )
    return result


def figure_backbone(method: str) -> Backbone:
    """The backbone of one map of Figure 1."""
    return Backbone("unsupervised", "resnet50", method, "" if method in PRETRAINED else FIGURE_1_TARGET)


def backbones(needed: Iterable[Measurement]) -> list[Backbone]:
    """Every backbone that must exist, once each, pretrained ones first."""
    found: dict[Backbone, None] = {}
    for measurement in needed:
        if measurement.backbone.method != "unsup_T":
            found[measurement.backbone.pretrained] = None
        found[measurement.backbone] = None
    return sorted(found, key=lambda backbone: backbone.method not in PRETRAINED)


def values(key: Key, evaluation: Mapping[str, Any], accuracy: str) -> list[float]:
    """A cell's figures by trial, as fractions, from the output of ``fastuft eval``.

    Args:
        key: the cell.
        evaluation: content of eval.json.
        accuracy: mean_class or top1, according to the data set's protocol.
    """
    kind, shots = _metric(key)
    if key[4] == SOURCE:
        found = evaluation.get("forgetting", {}).get("after")
    elif kind == "retrieval":
        return [evaluation["retrieval"]]
    elif kind == "cluster":
        found = evaluation["clustering"]
    else:
        runs = evaluation.get("fewshot" if kind == "fewshot" else "fixmatch", {})
        found = runs.get(str(shots), {}).get(accuracy)
    return [] if found is None else found["trials"]  # empty if the evaluation was for other tables


def result_rows(key: Key, measured: Mapping[int, tuple[Mapping[str, Any], str]], accuracy: str) -> list[dict[str, Any]]:
    """The rows of results.jsonl for one cell, in per cent.

    Args:
        key: the cell.
        measured: (content of eval.json, run folder) by seed.
        accuracy: mean_class or top1.
    """
    names = ("table", "pretraining", "backbone", "method", "dataset", "metric")
    rows: list[dict[str, Any]] = []
    for evaluation, folder in measured.values():
        for value in values(key, evaluation, accuracy):
            rows.append({**dict(zip(names, key, strict=True)), "trial": len(rows), "value": 100 * value, "run": folder})
    return rows


def cell_backbone(key: Key, seed: int) -> tuple[Backbone, str]:
    """(backbone, data set) that a cell is measured on."""
    return _backbone(key, seed), _training_of(key)[1]
