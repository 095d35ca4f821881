"""The paper's tables as a grid: cells (one published figure each), the trainings they need, and the plan.

The cells are the rows of the packaged ``paper_tables.csv``: nothing about a table is written twice. A :class:`Scale` holds
every size of a grid; the paper's and the tiny one differ in it alone, and no code asks which scale it runs at.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Literal

from fastuft.config import (
    AugmentConfig,
    BatchNormMode,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
    check_choice,
)

PRETRAINED = ("unsup_S", "sup_S")  # evaluated as they come
METHODS = (*PRETRAINED, "unsup_T", "naive", "naive_sdr", "ours")
_KEYS = ("table", "pretraining", "backbone", "method", "dataset", "metric")
TABLES = ("1", "2", "3", "4", "5", "6")


@dataclass(frozen=True)
class Cell:
    """One published figure: ``value`` is the paper's, in per cent."""

    table: str
    pretraining: str
    backbone: str
    method: str
    dataset: str
    metric: str
    value: float


@dataclass(frozen=True, order=True)
class Run:
    """One backbone that has to exist: the pretrained one, or one trained on a data set's training images."""

    pretraining: str
    backbone: str
    method: str
    dataset: str  # empty for a pretrained backbone, which serves every data set

    @property
    def name(self) -> str:
        """Folder name of the run."""
        return "-".join(part for part in (self.pretraining, self.backbone, self.method, self.dataset) if part)


@dataclass(frozen=True)
class Scale:
    """Every size of a grid.

    Args:
        archs: network by (pretraining, backbone) of the tables.
        stem: stem of the networks.
        train_sizes: (training images, classes) by data set.
        caltech_per_class: training images a class of Caltech101.
        resize: shorter side before the centre crop of evaluation, pixels.
        bn: batch statistics of the encoders.
        augment: views of the training streams, and the network's input side.
        pretrain: method, data and optimiser of MoCoV2 pretraining and of training from scratch on the target.
        finetune: the same of unsupervised finetuning.
        scratch_epochs: epochs of training from scratch on the target (Unsup-T).
        supervised: (epochs, learning rate, batch) of supervised pretraining where no checkpoint is given.
        trials: trials a cell.
        fewshot_epochs: epochs of few-shot finetuning.
        fewshot_lr: learning rate of the new FC.
        fewshot_backbone_lr: learning rate of the backbone.
        semi_epochs: epochs of FixMatch.
        semi_batch: labelled images a FixMatch step.
        kmeans_restarts: restarts of K-means.
        eval_batch: images a step of feature extraction.
        runtime: how the machine is used.
    """

    archs: Mapping[tuple[str, str], str]
    train_sizes: Mapping[str, tuple[int, int]]
    pretrain: tuple[MethodConfig, DataConfig, OptimConfig]
    finetune: tuple[MethodConfig, DataConfig, OptimConfig]
    scratch_epochs: int
    supervised: tuple[int, float, int]
    stem: Literal["imagenet", "small"] = "imagenet"
    caltech_per_class: int = 30
    resize: int = 256
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    bn: BatchNormMode = "auto"
    trials: int = 3
    fewshot_epochs: int = 30
    fewshot_lr: float = 3.0
    fewshot_backbone_lr: float = 1e-4
    semi_epochs: int = 30
    semi_batch: int = 64
    kmeans_restarts: int = 5
    eval_batch: int = 256
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def paper_cells() -> list[Cell]:
    """All published figures, in the order of the paper's tables."""
    text = (resources.files("fastuft.report") / "paper_tables.csv").read_text()
    rows = csv.DictReader(text.splitlines())
    return [Cell(**{name: row[name] for name in _KEYS}, value=float(row["value"])) for row in rows]


def cells_of(tables: Iterable[str], cells: Iterable[Cell]) -> list[Cell]:
    """The cells of the named tables; forgetting's figures, quoted in the text, belong to Table 6's arms."""
    chosen = [str(table) for table in tables]
    for table in chosen:
        check_choice("tables", table, (*TABLES, "text"))
    return [cell for cell in cells if cell.table in chosen]


def run_of(cell: Cell) -> Run:
    """The backbone a cell is measured on."""
    return Run(cell.pretraining, cell.backbone, cell.method, "" if cell.method in PRETRAINED else cell.dataset)


def pretrained_of(run: Run) -> Run:
    """The pretrained backbone a run starts from (itself, for a pretrained one)."""
    method = "unsup_S" if run.pretraining == "unsupervised" else "sup_S"
    return Run(run.pretraining, run.backbone, method, "")


def runs_of(cells: Iterable[Cell]) -> list[Run]:
    """Every backbone that the cells need, pretrained ones first, each once."""
    needed: dict[Run, None] = {}
    for cell in cells:
        run = run_of(cell)
        if run.method != "unsup_T":
            needed[pretrained_of(run)] = None
        needed[run] = None
    return sorted(needed, key=lambda run: (run.method not in PRETRAINED, run))


def train_config(
    run: Run, scale: Scale, *, target: str, source: str, init: str | None, out: str, seed: int
) -> TrainConfig:
    """The training that makes a run's backbone.

    MoCoV2 pretraining (lr 0.24, batch 2048, 800 epochs in the paper's recipe) for ``unsup_S`` on the source set and
    for ``unsup_T`` on the target; finetuning (lr 0.015, batch 256, 200 epochs) for the others: ``naive`` on the
    target alone, ``naive_sdr`` with the replayed source, ``ours`` with replay and mixing.
    """
    method, data, optim = scale.finetune
    if run.method in ("unsup_S", "unsup_T"):
        method, data, optim = scale.pretrain
        if run.method == "unsup_T":
            optim = dataclasses.replace(optim, epochs=scale.scratch_epochs)
        init = None
    elif run.method != "ours":
        method = dataclasses.replace(method, mix="none")
    return TrainConfig(
        target=source if run.method == "unsup_S" else target,
        source=source if run.method in ("naive_sdr", "ours") else None,
        init=init,
        out=out,
        seed=seed,
        resume="auto",
        model=ModelConfig(arch=scale.archs[run.pretraining, run.backbone], stem=scale.stem, bn=scale.bn),
        method=method,
        augment=scale.augment,
        data=data,
        optim=optim,
        runtime=scale.runtime,
    )
