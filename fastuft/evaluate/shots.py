"""Few-shot accuracy by finetuning the backbone with a new classifier (the paper's main metric)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastuft.evaluate.accuracy import mean_class_accuracy, top1_accuracy
from fastuft.evaluate.features import Precision, autocast, module_device
from fastuft.evaluate.images import decode, random_views
from fastuft.evaluate.inputs import ArrayLike, as_labels, check_seen, quoted
from fastuft.model import Backbone
from fastuft.randomness import keyed_generator, keyed_seed


@dataclass(frozen=True)
class FewShotSettings:
    """How one few-shot finetuning is done.

    Args:
        epochs: passes over the labeled images.
        lr: learning rate of the new classifier.
        backbone_lr: learning rate of the backbone.
        batch_size: largest batch; fewer images make one batch.
        size: input side, pixels.
        resize: shorter side at which decoded images are kept.
        crop_scale: area range of the random resized crop; (1, 1) leaves it out.
        flip_p: probability of the horizontal flip; 0 leaves it out.
        precision: auto (bf16 on a GPU), bf16 or fp32.
    """

    epochs: int = 30
    lr: float = 3.0
    backbone_lr: float = 1e-4
    batch_size: int = 256
    size: int = 224
    resize: int = 256
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip_p: float = 0.5
    precision: Precision = "auto"


@dataclass(frozen=True)
class FewShotResult:
    """Accuracies of all few-shot runs of one backbone, as fractions.

    Args:
        top1: top-1 accuracy of each trial, by K.
        mean_class: mean class accuracy of each trial, by K.
        train_loss: mean cross-entropy of each trial's last epoch, by K; near log(classes) or above, the learning
            rates do not suit the backbone and the accuracies say little about it.
        draws: positions in the training set, [trials, classes, largest K] int64; K shots are ``draws[t, :, :K]``.
    """

    top1: dict[int, list[float]]
    mean_class: dict[int, list[float]]
    train_loss: dict[int, list[float]]
    draws: np.ndarray


def draw_shots(labels: ArrayLike, shots: int, *, seed: int, trial: int = 0, classes: Sequence[Any] = ()) -> np.ndarray:
    """Positions of ``shots`` random items of each class, [classes, shots] int64.

    Draws of one (seed, trial) are nested: fewer shots are the first columns of more.

    Args:
        labels: [N].
        shots: K.
        seed: seed of the draws.
        trial: index of the draw.
        classes: names for messages, by label; empty shows the labels themselves.

    Raises:
        ValueError: a class has fewer than K items.
    """
    truth = as_labels("labels", labels)
    if shots < 1:
        raise ValueError(f"shots={shots!r} is out of range; at least 1 labeled image a class is needed")
    values, counts = np.unique(truth, return_counts=True)
    short = [(classes[int(v)] if len(classes) else v, int(c)) for v, c in zip(values, counts, strict=True) if c < shots]
    if short:
        raise ValueError(
            f"{shots} shots need {shots} training images of every class, but {len(short)} have fewer: "
            f"{quoted([name for name, _ in short])} (smallest: {min(c for _, c in short)}); "
            "use fewer shots or add images"
        )
    rows = []
    for position, value in enumerate(values):
        members = np.flatnonzero(truth == value)
        rows.append(keyed_generator(seed, "shots", trial, position).permutation(members)[:shots])
    return np.stack(rows).astype(np.int64)


def check_runs(shots: Sequence[int], trials: int) -> None:
    """Raise unless there is something to draw."""
    if not shots:
        raise ValueError("shots is empty; name at least one number of labeled images a class")
    if trials < 1:
        raise ValueError(f"trials={trials!r} is out of range; at least 1 is needed")


class Classifier(nn.Module):
    """A backbone and a new fully connected layer."""

    def __init__(self, backbone: Backbone, classes: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        features = backbone.num_features
        self.fc = nn.Linear(features, classes)
        with torch.no_grad():
            start = keyed_generator(seed, "classifier").normal(0.0, 0.01, (classes, features))
            self.fc.weight.copy_(torch.from_numpy(start))
            self.fc.bias.zero_()

    @classmethod
    def on(cls, backbone: Backbone, classes: int, seed: int) -> Classifier:
        """A classifier in training mode on a copy of ``backbone``, on its device."""
        return cls(copy.deepcopy(backbone), classes, seed).to(module_device(backbone)).train()

    def train(self, mode: bool = True) -> Classifier:
        """Training mode with BatchNorm left in eval mode: a few images are no statistics."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] in float32 under autocast too: in bfloat16 classes would tie."""
        features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.fc(features.float())
        return logits


def sgd(
    model: Classifier, lr: float, backbone_lr: float, steps: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
    """SGD with momentum 0.9 and no weight decay, and its cosine schedule to zero over ``steps``."""
    groups = [
        {"params": list(model.backbone.parameters()), "lr": backbone_lr},
        {"params": list(model.fc.parameters()), "lr": lr},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    return optimizer, schedule


def finetune(
    backbone: Backbone,
    images: Sequence[Tensor],
    labels: Tensor,
    classes: int,
    settings: FewShotSettings,
    *,
    seed: int,
) -> tuple[Classifier, float]:
    """A copy of ``backbone`` with a new classifier, finetuned on a few labeled images.

    SGD with momentum 0.9, no weight decay, cosine schedule to zero over all steps, random crop and flip,
    cross-entropy, BatchNorm in eval mode.

    Args:
        backbone: has ``num_features``, ``mean`` and ``std``; it is not changed.
        images: uint8 [3, H, W] each, on the backbone's device.
        labels: [n] int64 in 0..classes-1, on the same device.
        classes: outputs of the classifier.
        settings: the recipe.
        seed: seed of initialization, order and crops.

    Returns:
        the classifier in eval mode and the mean loss of its last epoch.

    Raises:
        ValueError: the loss stops being finite.
    """
    device = module_device(backbone)
    model = Classifier.on(backbone, classes, seed)
    batch = min(settings.batch_size, len(images))
    steps = settings.epochs * math.ceil(len(images) / batch)
    optimizer, schedule = sgd(model, settings.lr, settings.backbone_lr, steps)
    total = torch.zeros((), device=device)
    for epoch in range(settings.epochs):
        total.zero_()
        generator = keyed_generator(seed, "finetune", epoch)
        order = generator.permutation(len(images))
        shuffled = labels[torch.from_numpy(order).to(device, non_blocking=True)]
        for start in range(0, len(images), batch):
            index = order[start : start + batch]
            views = random_views(
                [images[i] for i in index],
                settings.size,
                generator,
                scale=settings.crop_scale,
                flip_p=settings.flip_p,
                mean=backbone.mean,
                std=backbone.std,
            )
            with autocast(device, settings.precision):
                logits = model(views)
            loss = F.cross_entropy(logits, shuffled[start : start + batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(index)
    last = float(total) / len(images)
    if not math.isfinite(last):
        raise ValueError(
            f"few-shot finetuning diverged (loss of the last epoch {last}) at fewshot_lr={settings.lr:g}, "
            f"fewshot_backbone_lr={settings.backbone_lr:g}; lower them"
        )
    return model.eval(), last


@torch.no_grad()
def predict(
    models: Sequence[nn.Module], stream: Iterable[tuple[Tensor, Tensor | None]], precision: Precision = "auto"
) -> np.ndarray:
    """Predicted labels [models, N] of several models in one pass over a stream of (images, labels)."""
    device = module_device(models[0])
    batches = []
    for images, _ in stream:
        images = images.to(device, non_blocking=True)
        with autocast(device, precision):
            batches.append(torch.stack([model(images).argmax(1) for model in models]))
    return torch.cat(batches, dim=1).cpu().numpy()


def accuracies(
    shots: Sequence[int], predicted: np.ndarray, truth: np.ndarray
) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """(top-1, mean class) accuracy of each model, in order, by its K; predicted [models, N], truth [N]."""
    top1: dict[int, list[float]] = {k: [] for k in shots}
    mean_class: dict[int, list[float]] = {k: [] for k in shots}
    for k, answers in zip(shots, predicted, strict=True):
        top1[k].append(top1_accuracy(answers, truth))
        mean_class[k].append(mean_class_accuracy(answers, truth))
    return top1, mean_class


def fewshot(
    backbone: Backbone,
    train_paths: Sequence[str],
    train_labels: ArrayLike,
    test: Iterable[tuple[Tensor, Tensor | None]],
    test_labels: ArrayLike,
    *,
    shots: Sequence[int] = (1, 2, 4, 8),
    trials: int = 3,
    seed: int = 0,
    classes: Sequence[str] = (),
    settings: FewShotSettings | None = None,
) -> FewShotResult:
    """Test accuracy after finetuning on K labeled images a class, for several K and trials.

    Each trial decodes its largest draw once; smaller K reuse its first images. All finetuned models then share one
    pass over the test stream, so test images are decoded once as well.

    Args:
        backbone: on the device to work on; it is not changed.
        train_paths: training images to draw from.
        train_labels: their labels [N].
        test: stream of (images, labels) over the test set, normalized for this backbone.
        test_labels: labels [Q] in the stream's order; every class must occur in training.
        shots: the values of K.
        trials: draws for each K.
        seed: seed of draws, initialization, order and crops.
        classes: class names by label, for messages.
        settings: the recipe; None is the paper's.

    Raises:
        ValueError: no shots, a class with fewer than K images, one class only, a test class absent from training, or a
            loss that stops being finite.
    """
    recipe = settings or FewShotSettings()
    check_runs(shots, trials)
    truth, given = as_labels("test_labels", test_labels), as_labels("train_labels", train_labels, len(train_paths))
    check_seen(given, truth)
    values = np.unique(given)
    target = torch.from_numpy(np.arange(len(values)))
    most = max(shots)
    draws = np.stack([draw_shots(given, most, seed=seed, trial=t, classes=classes) for t in range(trials)])
    device = module_device(backbone)
    models: list[nn.Module] = []
    runs: list[int] = []
    losses: list[float] = []
    for trial in range(trials):
        pool = [image.to(device) for image in decode([train_paths[i] for i in draws[trial].ravel()], recipe.resize)]
        for k in shots:
            chosen = np.arange(draws[trial].size).reshape(len(values), most)[:, :k].ravel()
            labels = target.repeat_interleave(k).to(device)
            key = keyed_seed(seed, "fewshot", trial, k)
            model, loss = finetune(backbone, [pool[i] for i in chosen], labels, len(values), recipe, seed=key)
            models.append(model)
            runs.append(k)
            losses.append(loss)
    top1, mean_class = accuracies(runs, values[predict(models, test, recipe.precision)], truth)
    result = FewShotResult(top1, mean_class, {k: [] for k in shots}, draws)
    for k, loss in zip(runs, losses, strict=True):
        result.train_loss[k].append(loss)
    return result
