"""FixMatch (Sohn et al. 2020): learning from a few labeled images per class and all training images without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastuft.config import AugmentConfig, FewShotConfig, SemiConfig
from fastuft.data import Loader, Loading, StrongConfig, WeakStrongStream
from fastuft.device import Precision, autocast
from fastuft.evaluate.classifier import Classifier, diverged, predict, sgd
from fastuft.evaluate.draws import LabeledDraws
from fastuft.evaluate.features import module_device
from fastuft.evaluate.few_shot import FewShotResult
from fastuft.evaluate.images import random_views
from fastuft.evaluate.inputs import ArrayLike, UndefinedError
from fastuft.model import Backbone
from fastuft.randomness import keyed_generator, keyed_seed


@dataclass(frozen=True)
class FixMatchResult(FewShotResult):
    """The results of few-shot finetuning, and the share of unlabeled images that was used.

    Args:
        confident: share of unlabeled images above the threshold in each trial's last epoch, by K.
    """

    confident: dict[int, list[float]] = field(default_factory=dict)


def unlabeled_loss(weak: Tensor, strong: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Mean of 1[max p >= threshold] CE(strong, argmax p) over all images, p from the weak view (Sohn et al. 2020, Eq. 4).

    Args:
        weak: logits [B, C] of the weak views; constants.
        strong: logits [B, C] of the strong views.
        threshold: tau.

    Returns:
        (loss, share of images above the threshold), scalars.
    """
    confidence, guess = weak.detach().float().softmax(1).max(1)
    counted = (confidence >= threshold).float()
    return (F.cross_entropy(strong.float(), guess, reduction="none") * counted).mean(), counted.mean()


class _Student:
    """One finetuning: its labeled images, model and optimizer."""

    def __init__(
        self,
        backbone: Backbone,
        images: list[Tensor],
        labels: Tensor,
        config: SemiConfig,
        finetuning: FewShotConfig,
        *,
        size: int,
        precision: Precision,
        steps: int,
        seed: int,
    ) -> None:
        self.images, self.labels, self.seed = images, labels, seed
        self.config, self.finetuning, self.size, self.precision = config, finetuning, size, precision
        self.model = Classifier.on(backbone, int(labels.max()) + 1, seed)
        self.optimizer, self.schedule = sgd(self.model, finetuning.lr, finetuning.backbone_lr, steps)
        self.source = self.model.backbone
        self.step_number = 0
        self.totals = torch.zeros(2, device=labels.device)  # labeled loss and confident share of this epoch

    def _labeled(self) -> tuple[Tensor, Tensor]:
        """The next labeled batch, from consecutive shuffled passes."""
        batch, count = self.config.batch_size, len(self.images)
        first = self.step_number * batch
        drawn = range(first, first + batch)
        passes = {
            p: keyed_generator(self.seed, "labelled", p).permutation(count) for p in {draw // count for draw in drawn}
        }
        index = np.array([passes[draw // count][draw % count] for draw in drawn])
        views = random_views(
            [self.images[i] for i in index],
            self.size,
            keyed_generator(self.seed, "crops", self.step_number),
            scale=self.finetuning.crop_scale,
            flip_p=self.finetuning.flip_p,
            mean=self.source.mean,
            std=self.source.std,
        )
        return views, self.labels[torch.from_numpy(index).to(self.labels.device, non_blocking=True)]

    def step(self, weak: Tensor, strong: Tensor) -> None:
        """One update from a labeled batch and the weak and strong views of an unlabeled batch."""
        views, labels = self._labeled()
        with autocast(views.device, self.precision):
            with torch.no_grad():
                guesses = self.model(weak)
            logits = self.model(torch.cat([views, strong]))
        supervised = F.cross_entropy(logits[: len(views)], labels)
        consistency, counted = unlabeled_loss(guesses, logits[len(views) :], self.config.threshold)
        self.optimizer.zero_grad(set_to_none=True)
        (supervised + self.config.weight * consistency).backward()
        self.optimizer.step()
        self.schedule.step()
        self.step_number += 1
        self.totals += torch.stack([supervised.detach(), counted]) * len(weak)

    def end_of_epoch(self, count: int) -> tuple[float, float]:
        """(labeled loss, confident share) of the epoch that just ended."""
        loss, confident = (self.totals / count).tolist()
        self.totals.zero_()
        return loss, confident


def fixmatch(
    backbone: Backbone,
    train_paths: Sequence[str],
    train_labels: ArrayLike,
    test: Iterable[tuple[Tensor, Tensor | None]],
    test_labels: ArrayLike,
    *,
    config: SemiConfig | None = None,
    finetuning: FewShotConfig | None = None,
    strong: StrongConfig | None = None,
    size: int = 224,
    resize: int = 256,
    precision: Precision = "auto",
    trials: int = 3,
    seed: int = 0,
    classes: Sequence[str] = (),
    loader: Loader = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> FixMatchResult:
    """Test accuracy after FixMatch, starting from ``backbone``, for several K and trials.

    The labeled images are the same draws as in few-shot finetuning with this seed. All finetunings share one pass over the
    unlabeled images per epoch, so every image is decoded once per epoch. They use SGD with momentum 0.9, no weight decay, a
    cosine schedule and BatchNorm in eval mode, and evaluate the weights of the last step (FixMatch's own code evaluates a
    moving average).

    Args:
        backbone: the network, on the device to work on; it is not changed.
        train_paths: all training images.
        train_labels: their labels [N], used only for the drawn images.
        test: stream of (images, labels) of the test set, normalized for this backbone.
        test_labels: labels [Q] in the stream's order; every class must occur in training.
        config: values of K and the recipe; None takes the paper's recipe with K = 2, 4, 8.
        finetuning: learning rates, crop and flip of the weak views; None takes those of few-shot finetuning.
        strong: RandAugment and Cutout of the strong views; None takes the paper's.
        size: side of the input, pixels.
        resize: shorter side of decoded images, pixels.
        precision: auto (bf16 on a GPU), bf16 or fp32.
        trials: draws per K.
        seed: seed of draws, initialization, order and views.
        classes: class names by label, for messages.
        loader: dali, torch or auto.
        progress: called with (epochs done, total epochs).

    Raises:
        ValueError: no shots, a class with fewer than K images, only one class, or a test class that is not in training.
        UndefinedError: finetuning diverged for every K; if only some diverged, ``undefined`` names them.
    """
    recipe, rates = config or SemiConfig(shots=[2, 4, 8]), finetuning or FewShotConfig()
    drawn = LabeledDraws(
        train_paths, train_labels, test_labels, shots=recipe.shots, trials=trials, seed=seed, classes=classes
    )
    device = module_device(backbone)
    stream = WeakStrongStream(
        train_paths,
        loading=Loading(backbone.mean, backbone.std, device, loader=loader),
        augment=AugmentConfig(
            size=size, crop_scale=rates.crop_scale, flip_p=rates.flip_p, jitter_p=0, grayscale_p=0, blur_p=0
        ),
        strong=strong or StrongConfig(),
        batch_size=recipe.ratio * recipe.batch_size,
        seed=keyed_seed(seed, "unlabelled"),
    )
    students: list[tuple[int, _Student]] = []
    for trial, k, images, labels in drawn.runs(resize, device):
        student = _Student(
            backbone,
            images,
            labels,
            recipe,
            rates,
            size=size,
            precision=precision,
            steps=recipe.epochs * len(stream),
            seed=keyed_seed(seed, "fixmatch", trial, k),
        )
        students.append((k, student))
    last: list[tuple[float, float]] = []
    try:
        for epoch in range(recipe.epochs):
            for weak, strong_views in stream.epoch(epoch):
                for _, student in students:
                    student.step(weak, strong_views)
            last = [student.end_of_epoch(len(train_paths)) for _, student in students]
            if progress:
                progress(epoch + 1, recipe.epochs)
    finally:
        stream.close()
    undefined = {
        k: str(diverged("FixMatch", loss, rates))
        for (k, _), (loss, _) in zip(students, last, strict=True)
        if not math.isfinite(loss)
    }
    kept = [(k, student.model.eval(), *ends) for (k, student), ends in zip(students, last, strict=True)]
    kept = [run for run in kept if run[0] not in undefined]
    if not kept:
        raise UndefinedError(next(iter(undefined.values())))
    predicted = predict([model for _, model, _, _ in kept], test, precision)
    top1, mean_class = drawn.accuracies([k for k, *_ in kept], predicted)
    losses = {k: [loss for of, _, loss, _ in kept if of == k] for k in top1}
    confident = {k: [share for of, _, _, share in kept if of == k] for k in top1}
    return FixMatchResult(top1, mean_class, losses, drawn.positions, undefined, confident)
