"""Options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastuft.config.checks import NonEmptyPath, check_choice, check_range


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of one backbone on folders of images (Li et al. 2021, Section 4).

    Args:
        checkpoint: exported backbone, run folder, or any checkpoint ``init`` takes.
        train: training folder; with class sub-folders the labeled metrics are computed.
        test: test folder with the same classes.
        source: source folder, for forgetting and drift.
        before: checkpoint to compare with (usually the initialization).
        out: folder for eval.json and report.html.
        arch: network of a checkpoint that does not say it.
        stem: stem of a checkpoint that does not say it.
        size: network input side, pixels.
        resize: shorter side before the center crop; 0 means size * 256 / 224.
        batch_size: images a step.
        shots: labeled images a class of the few-shot runs; empty leaves them out.
        trials: seeds per figure.
        fewshot_epochs: epochs of each few-shot finetuning.
        fewshot_lr: learning rate of the new FC.
        fewshot_backbone_lr: learning rate of the backbone.
        fewshot_crop_scale: area range of the random resized crop; (1, 1) leaves the crop out (small images).
        fewshot_flip_p: probability of the horizontal flip; 0 leaves it out (digits, letters).
        semi_shots: labeled images a class of the FixMatch runs; empty leaves them out.
        semi_epochs: passes over the unlabeled images of each FixMatch run.
        semi_batch: labeled images a step of FixMatch; seven times as many unlabeled ones join.
        kmeans_restarts: K-means restarts, the lowest inertia is kept.
        tsne_points: images of the t-SNE map; 0 leaves it out.
        gallery: query images of the report's gallery; 0 leaves it out.
        cache: folder that keeps features by content hash; none keeps nothing.
        seed: seed of draws and K-means.
        device: auto, cuda or cpu.
        precision: auto is bf16 on a GPU and fp32 on a CPU.
        loader: dali, torch or auto.
    """

    checkpoint: str
    train: str
    test: str | None = None
    source: str | None = None
    before: str | None = None
    out: str = "runs/eval"
    arch: str | None = None
    stem: Literal["imagenet", "small"] | None = None
    size: int = 224
    resize: int = 0
    batch_size: int = 256
    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    trials: int = 3
    fewshot_epochs: int = 30
    fewshot_lr: float = 3.0
    fewshot_backbone_lr: float = 1e-4
    fewshot_crop_scale: tuple[float, float] = (0.08, 1.0)
    fewshot_flip_p: float = 0.5
    semi_shots: list[int] = field(default_factory=list)
    semi_epochs: int = 30
    semi_batch: int = 64
    kmeans_restarts: int = 5
    tsne_points: int = 1000
    gallery: int = 24
    cache: str | None = None
    seed: int = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    loader: Literal["auto", "dali", "torch"] = "auto"

    def __post_init__(self) -> None:
        for name in ("checkpoint", "train", "test", "source", "before", "out"):
            NonEmptyPath().check(name, getattr(self, name))
        if self.stem is not None:
            check_choice("stem", self.stem, ("imagenet", "small"))
        check_choice("loader", self.loader, ("auto", "dali", "torch"))
        check_range("size", self.size, 8)
        check_range("resize", self.resize, 0)
        check_range("batch_size", self.batch_size, 1)
        check_range("trials", self.trials, 1)
        check_range("fewshot_epochs", self.fewshot_epochs, 1)
        check_range("fewshot_lr", self.fewshot_lr, 0.0, low_open=True)
        check_range("fewshot_backbone_lr", self.fewshot_backbone_lr, 0.0)
        check_range("kmeans_restarts", self.kmeans_restarts, 1)
        check_range("tsne_points", self.tsne_points, 0)
        check_range("gallery", self.gallery, 0)
        check_choice("device", self.device, ("auto", "cuda", "cpu"))
        check_choice("precision", self.precision, ("auto", "bf16", "fp32"))
        check_range("fewshot_flip_p", self.fewshot_flip_p, 0.0, 1.0)
        low, high = self.fewshot_crop_scale
        check_range("fewshot_crop_scale[0]", low, 0.0, high, low_open=True)
        check_range("fewshot_crop_scale[1]", high, low, 1.0)
        for shot in self.shots:
            check_range("shots", shot, 1)
        for shot in self.semi_shots:
            check_range("semi_shots", shot, 1)
        check_range("semi_epochs", self.semi_epochs, 1)
        check_range("semi_batch", self.semi_batch, 1)
