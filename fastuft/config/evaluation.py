"""Options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastuft.config.checks import (
    AtLeast0,
    AtLeast1,
    Fraction,
    NonNegative,
    PathName,
    Positive,
    Range,
    Span,
    check_values,
)
from fastuft.config.data import DataConfig


@dataclass(frozen=True)
class FewShotConfig:
    """Finetuning the backbone with a new classifier on a few labeled images (the paper's main metric).

    Args:
        shots: labeled images per class, with one run per number; empty skips the runs.
        epochs: passes over the labeled images.
        lr: learning rate of the new classifier.
        backbone_lr: learning rate of the backbone.
        batch_size: largest batch; fewer images make one batch.
        crop_scale: area range of the random resized crop; (1, 1) turns it off (small images).
        flip_p: probability of the horizontal flip; 0 turns it off (digits, letters).
    """

    shots: list[AtLeast1] = field(default_factory=lambda: [1, 2, 4, 8])
    epochs: AtLeast1 = 30
    lr: Positive = 3.0
    backbone_lr: NonNegative = 1e-4
    batch_size: AtLeast1 = 256
    crop_scale: Annotated[tuple[float, float], Span(1.0)] = (0.08, 1.0)
    flip_p: Fraction = 0.5

    def __post_init__(self) -> None:
        check_values(self, "fewshot")


@dataclass(frozen=True)
class SemiConfig:
    """FixMatch (Sohn et al. 2020): a few labeled images, and all training images without their labels.

    It uses the learning rates, crop and flip of few-shot finetuning.

    Args:
        shots: labeled images per class, with one run per number; empty skips the runs.
        epochs: passes over the unlabeled images.
        batch_size: labeled images per step.
        ratio: unlabeled images per labeled image in a step; with a smaller set, an epoch has one step.
        threshold: confidence from which the weak view's prediction is used as a label.
        weight: weight of the unlabeled loss.
    """

    shots: list[AtLeast1] = field(default_factory=list)
    epochs: AtLeast1 = 30
    batch_size: AtLeast1 = 64
    ratio: AtLeast1 = 7
    threshold: NonNegative = 0.95
    weight: NonNegative = 1.0

    def __post_init__(self) -> None:
        check_values(self, "semi")


@dataclass(frozen=True)
class ClusteringConfig:
    """K-means on the features, with as many clusters as classes.

    Args:
        restarts: independent starts, of which the solution with the lowest inertia is kept.
    """

    restarts: AtLeast1 = 5

    def __post_init__(self) -> None:
        check_values(self, "clustering")


@dataclass(frozen=True)
class MapConfig:
    """The t-SNE map of the features.

    Args:
        points: images on the map; 0 skips it.
        perplexity: perplexity of t-SNE, lowered to (N - 1) / 3 for few images.
    """

    points: AtLeast0 = 1000
    perplexity: Positive = 30.0

    def __post_init__(self) -> None:
        check_values(self, "map")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of one backbone on folders of images (Li et al. 2021, Section 4).

    Args:
        checkpoint: exported backbone, run folder, or any checkpoint that ``init`` takes.
        train: training folder; with class folders, the labeled metrics are computed.
        test: test folder with the same classes.
        source: source folder, for forgetting and drift.
        before: checkpoint to compare with (usually the initialization).
        before_fewshot: few-shot finetuning of ``before`` too, on the same images, which takes as long again.
        out: folder for eval.json and report.html.
        arch: the network, if the checkpoint does not name it.
        stem: the stem, if the checkpoint does not name it.
        init_key: prefix of one of several backbones in the checkpoint (encoder_k, teacher); none takes the one that was
            trained by gradients.
        init_channels: channels of its first convolution; auto is RGB or what the layout says, bgr and gray are converted.
        before_key: like init_key, for ``before``.
        size: side of the network's input, pixels; null takes the training crop of a run folder, else the network's own.
        resize: shorter side before the center crop; 0 means size * 256 / 224.
        batch_size: images per batch.
        trials: draws or starts behind each mean.
        fewshot: few-shot finetuning.
        semi: FixMatch.
        clustering: K-means.
        map: the t-SNE map.
        gallery: query images in the report's gallery; 0 skips it.
        on_bad_file: error names the file and stops; skip leaves it out and counts it.
        suffixes: suffixes of image files in folders, as in data.suffixes of a run.
        cache: folder that stores features by content hash; none stores nothing.
        seed: seed of draws and K-means.
        device: auto, cuda or cpu.
        precision: auto is bf16 on a GPU and fp32 on a CPU.
        loader: dali, torch or auto.
    """

    checkpoint: PathName
    train: PathName
    test: PathName | None = None
    source: PathName | None = None
    before: PathName | None = None
    before_fewshot: bool = False
    out: PathName = "runs/eval"
    arch: str | None = None
    stem: Literal["imagenet", "small"] | None = None
    init_key: str | None = None
    init_channels: Literal["auto", "rgb", "bgr", "gray"] = "auto"
    before_key: str | None = None
    size: Annotated[int, Range(8)] | None = None
    resize: AtLeast0 = 0
    batch_size: AtLeast1 = 256
    trials: AtLeast1 = 3
    fewshot: FewShotConfig = field(default_factory=FewShotConfig)
    semi: SemiConfig = field(default_factory=SemiConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    map: MapConfig = field(default_factory=MapConfig)
    gallery: AtLeast0 = 24
    on_bad_file: Literal["error", "skip"] = "error"
    suffixes: tuple[str, ...] = DataConfig.suffixes
    cache: str | None = None
    seed: int = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    loader: Literal["auto", "dali", "torch"] = "auto"

    def __post_init__(self) -> None:
        check_values(self)
