"""FixMatch (Sohn et al. 2020): a few labeled images a class, and all training images without their labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastuft.config import AugmentConfig
from fastuft.data import Loader, Loading, StrongConfig, WeakStrongStream
from fastuft.evaluate.features import autocast, module_device
from fastuft.evaluate.images import decode, random_views
from fastuft.evaluate.inputs import ArrayLike, as_labels, check_seen
from fastuft.evaluate.shots import (
    Classifier,
    FewShotResult,
    FewShotSettings,
    accuracies,
    check_runs,
    draw_shots,
    predict,
    sgd,
)
from fastuft.model import Backbone
from fastuft.randomness import keyed_generator, keyed_seed

RATIO = 7  # unlabeled images for each labeled one of a step (mu)
THRESHOLD = 0.95  # confidence from which the guess of the weak view is a label (tau)


@dataclass(frozen=True)
class FixMatchSettings:
    """How one FixMatch finetuning is done; the recipe shares few-shot's epochs, rates, crop and flip.

    Args:
        finetuning: epochs (passes over the unlabeled images), rates, crop and flip of the weak views; its batch is the
            labeled images a step.
        strong: RandAugment and Cutout of the strong view.
        threshold: confidence from which a guess counts.
        ratio: unlabeled images for each labeled one of a step; a smaller set makes one step an epoch.
        weight: of the unlabeled loss.
    """

    finetuning: FewShotSettings = field(default_factory=lambda: FewShotSettings(batch_size=64))
    strong: StrongConfig = field(default_factory=StrongConfig)
    threshold: float = THRESHOLD
    ratio: int = RATIO
    weight: float = 1.0


@dataclass(frozen=True)
class FixMatchResult(FewShotResult):
    """As of few-shot, and how much of the unlabeled images was used.

    Args:
        confident: share of unlabeled images above the threshold in each trial's last epoch, by K.
    """

    confident: dict[int, list[float]] = field(default_factory=dict)


def unlabeled_loss(weak: Tensor, strong: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Mean over all images of 1[max p >= threshold] CE(strong, argmax p), p of the weak view (Sohn et al. 2020, Eq. 4).

    Args:
        weak: logits [B, C] of the weak views; constants.
        strong: logits [B, C] of the strong views.
        threshold: tau.

    Returns:
        (loss, share of images that counted), scalars.
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
        settings: FixMatchSettings,
        steps: int,
        seed: int,
    ) -> None:
        self.images, self.labels, self.settings, self.seed = images, labels, settings, seed
        self.model = Classifier.on(backbone, int(labels.max()) + 1, seed)
        recipe = settings.finetuning
        self.optimizer, self.schedule = sgd(self.model, recipe.lr, recipe.backbone_lr, steps)
        self.source = self.model.backbone
        self.step_number = 0
        self.totals = torch.zeros(2, device=labels.device)  # labeled loss and confident share of this epoch

    def _labeled(self) -> tuple[Tensor, Tensor]:
        """The next labeled batch: whole shuffled passes one after the other."""
        recipe, count = self.settings.finetuning, len(self.images)
        first = self.step_number * recipe.batch_size
        places = range(first, first + recipe.batch_size)
        passes = {
            p: keyed_generator(self.seed, "labelled", p).permutation(count)
            for p in {place // count for place in places}
        }
        index = np.array([passes[place // count][place % count] for place in places])
        views = random_views(
            [self.images[i] for i in index],
            recipe.size,
            keyed_generator(self.seed, "crops", self.step_number),
            scale=recipe.crop_scale,
            flip_p=recipe.flip_p,
            mean=self.source.mean,
            std=self.source.std,
        )
        return views, self.labels[torch.from_numpy(index).to(self.labels.device, non_blocking=True)]

    def step(self, weak: Tensor, strong: Tensor) -> None:
        """One update from a labeled batch and an unlabeled one's weak and strong views."""
        views, labels = self._labeled()
        with autocast(views.device, self.settings.finetuning.precision):
            with torch.no_grad():
                guesses = self.model(weak)
            logits = self.model(torch.cat([views, strong]))
        supervised = F.cross_entropy(logits[: len(views)], labels)
        consistency, counted = unlabeled_loss(guesses, logits[len(views) :], self.settings.threshold)
        self.optimizer.zero_grad(set_to_none=True)
        (supervised + self.settings.weight * consistency).backward()
        self.optimizer.step()
        self.schedule.step()
        self.step_number += 1
        self.totals += torch.stack([supervised.detach(), counted]) * len(weak)

    def end_of_epoch(self, count: int) -> tuple[float, float]:
        """(labeled loss, confident share) of the epoch that ends."""
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
    shots: Sequence[int] = (2, 4, 8),
    trials: int = 3,
    seed: int = 0,
    classes: Sequence[str] = (),
    settings: FixMatchSettings | None = None,
    loader: Loader = "auto",
) -> FixMatchResult:
    """Test accuracy after FixMatch from ``backbone``, for several K and trials.

    The labeled images are few-shot's draws of the same seed. All finetunings go through the unlabeled images together,
    so every image is decoded once an epoch for all of them. SGD with momentum 0.9, no weight decay, cosine schedule,
    BatchNorm in eval mode, and the weights of the last step (FixMatch's own code evaluates a moving average).

    Args:
        backbone: on the device to work on; it is not changed.
        train_paths: all training images.
        train_labels: their labels [N]; used for the drawn images alone.
        test: stream of (images, labels) over the test set, normalized for this backbone.
        test_labels: labels [Q] in the stream's order; every class must occur in training.
        shots: the values of K.
        trials: draws for each K.
        seed: seed of draws, initialization, order and views.
        classes: class names by label, for messages.
        settings: the recipe; None is the paper's.
        loader: dali, torch or auto.

    Raises:
        ValueError: no shots, a class with fewer than K images, one class only, a test class absent from training, or a
            loss that stops being finite.
    """
    options = settings or FixMatchSettings()
    recipe = options.finetuning
    check_runs(shots, trials)
    truth, given = as_labels("test_labels", test_labels), as_labels("train_labels", train_labels, len(train_paths))
    check_seen(given, truth)
    values = np.unique(given)
    most = max(shots)
    draws = np.stack([draw_shots(given, most, seed=seed, trial=t, classes=classes) for t in range(trials)])
    device = module_device(backbone)
    stream = WeakStrongStream(
        train_paths,
        loading=Loading(backbone.mean, backbone.std, device, loader=loader),
        augment=AugmentConfig(
            size=recipe.size, crop_scale=recipe.crop_scale, flip_p=recipe.flip_p, jitter_p=0, grayscale_p=0, blur_p=0
        ),
        strong=options.strong,
        batch_size=options.ratio * recipe.batch_size,
        seed=keyed_seed(seed, "unlabelled"),
    )
    students: list[tuple[int, _Student]] = []
    for trial in range(trials):
        pool = [image.to(device) for image in decode([train_paths[i] for i in draws[trial].ravel()], recipe.resize)]
        for k in shots:
            chosen = np.arange(draws[trial].size).reshape(len(values), most)[:, :k].ravel()
            labels = torch.arange(len(values), device=device).repeat_interleave(k)
            key = keyed_seed(seed, "fixmatch", trial, k)
            images = [pool[i] for i in chosen]
            students.append((k, _Student(backbone, images, labels, options, recipe.epochs * len(stream), key)))
    last: list[tuple[float, float]] = []
    try:
        for epoch in range(recipe.epochs):
            for weak, strong in stream.epoch(epoch):
                for _, student in students:
                    student.step(weak, strong)
            last = [student.end_of_epoch(len(train_paths)) for _, student in students]
    finally:
        stream.close()
    if not all(math.isfinite(loss) for loss, _ in last):
        raise ValueError(
            f"FixMatch diverged at fewshot_lr={recipe.lr:g}, fewshot_backbone_lr={recipe.backbone_lr:g}; lower them"
        )
    models = [student.model.eval() for _, student in students]
    ks = [k for k, _ in students]
    top1, mean_class = accuracies(ks, values[predict(models, test, recipe.precision)], truth)
    result = FixMatchResult(top1, mean_class, {k: [] for k in shots}, draws, {k: [] for k in shots})
    for k, (loss, confident) in zip(ks, last, strict=True):
        result.train_loss[k].append(loss)
        result.confident[k].append(confident)
    return result
