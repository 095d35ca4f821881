"""Options of the paper's grid of runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from fastuft.config.checks import AtLeast1, Positive, check_range, check_values

Table = Literal["1", "2", "3", "4", "5", "6", "text"]
Figure = Literal[1]
Dataset = Literal["caltech101", "pet", "cifar100", "food101"]
TABLES: tuple[Table, ...] = get_args(Table)
FIGURES: tuple[Figure, ...] = get_args(Figure)
DATASETS: tuple[Dataset, ...] = get_args(Dataset)


@dataclass(frozen=True)
class WeightsConfig:
    """Pretrained checkpoints; a missing one is trained on the source if the scale has a recipe for it.

    Args:
        unsupervised_resnet50: MoCoV2 ResNet-50, 800 epochs (Tables 1, 2, 5, 6).
        supervised_bit_resnet50: BiT-S-R50x1.npz (Table 3).
        supervised_bit_resnet101: BiT-S-R101x1.npz (Table 4).
    """

    unsupervised_resnet50: str | None = None
    supervised_bit_resnet50: str | None = None
    supervised_bit_resnet101: str | None = None


@dataclass(frozen=True)
class ReproduceConfig:
    """Rerun the paper's tables (Li et al. 2021) and compare the figures with the paper's.

    Args:
        out: folder for runs, evaluations and tables; finished parts are kept.
        tables: the tables to make; text is the forgetting of the source.
        figure: numbers of the paper's plots to draw (1: Figure 1).
        datasets: the target data sets.
        data: folder with the data sets as published; the tiny scale makes its own.
        source: source images, in class folders or .tar shards; by default DATA/imagenet/train.
        forgetting: labeled source images to cluster; by default the whole source.
        weights: pretrained checkpoints.
        scale: paper, or tiny: the same grid on bundled images, on a CPU.
        trials: draws or starts per figure.
        seeds: trainings per backbone, each with all trials.
        processes: processes per training on this machine, one per GPU.
        stage: pretrain (only pretrained backbones), runs (trainings and evaluations), tables (from existing results), or all.
        task: index of this task in a job array that shares the work of a stage.
        tasks: number of tasks in the job array.
        dry_run: print the plan and stop.
        rate: training images per second that `fastuft bench step` measured; the plan then shows hours.
        loader: dali, torch or auto.
    """

    out: str = "runs/reproduce"
    tables: list[Table] = field(default_factory=lambda: list(TABLES))
    figure: list[Figure] = field(default_factory=lambda: list(FIGURES))
    datasets: list[Dataset] = field(default_factory=lambda: list(DATASETS))
    data: str | None = None
    source: str | None = None
    forgetting: str | None = None
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    scale: Literal["paper", "tiny"] = "paper"
    trials: AtLeast1 = 3
    seeds: AtLeast1 = 1
    processes: AtLeast1 = 1
    stage: Literal["all", "pretrain", "runs", "tables"] = "all"
    task: int = 0
    tasks: AtLeast1 = 1
    dry_run: bool = False
    rate: Positive | None = None
    loader: Literal["auto", "dali", "torch"] = "auto"

    def __post_init__(self) -> None:
        check_values(self)
        check_range("task", self.task, 0, self.tasks - 1)
