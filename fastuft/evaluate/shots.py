"""Few-shot accuracy by finetuning the backbone with a new classifier (the paper's main metric)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastuft.config import FewShotConfig
from fastuft.device import Precision, autocast
from fastuft.evaluate.accuracy import mean_class_accuracy, top1_accuracy
from fastuft.evaluate.features import module_device
from fastuft.evaluate.images import decode, random_views
from fastuft.evaluate.inputs import ArrayLike, UndefinedError, as_labels, check_seen, quoted
from fastuft.model import Backbone
from fastuft.randomness import keyed_generator, keyed_seed


@dataclass(frozen=True)
class FewShotResult:
    """The accuracies of all few-shot runs of one backbone, as fractions.

    Args:
        top1: top-1 accuracy of each trial, by K.
        mean_class: mean class accuracy of each trial, by K.
        train_loss: mean cross-entropy of each trial's last epoch, by K. If it is near log(classes) or above, the learning
            rates do not suit the backbone and the accuracies say little about it.
        draws: indices into the training set, [trials, classes, largest K] int64; K shots are ``draws[t, :, :K]``.
        undefined: why a K has no accuracy (its finetuning diverged); such a K is missing from the other fields.
    """

    top1: dict[int, list[float]]
    mean_class: dict[int, list[float]]
    train_loss: dict[int, list[float]]
    draws: np.ndarray
    undefined: dict[int, str] = field(default_factory=dict)


def draw_shots(labels: ArrayLike, shots: int, *, seed: int, trial: int = 0, classes: Sequence[Any] = ()) -> np.ndarray:
    """Indices of ``shots`` random items of each class, [classes, shots] int64.

    Draws with the same (seed, trial) are nested: fewer shots are the first columns of more.

    Args:
        labels: [N].
        shots: K.
        seed: seed of the draws.
        trial: index of the draw.
        classes: class names by label, for messages; if empty, messages show the labels.

    Raises:
        ValueError: a class has fewer than K items.
    """
    truth = as_labels("labels", labels)
    if shots < 1:
        raise ValueError(f"shots={shots!r} is out of range; at least 1 labeled image per class is needed")
    values, counts = np.unique(truth, return_counts=True)
    short = [(classes[int(v)] if len(classes) else v, int(c)) for v, c in zip(values, counts, strict=True) if c < shots]
    if short:
        raise ValueError(
            f"{shots} shots need {shots} training images of every class, but {len(short)} of {len(values)} classes have fewer: "
            f"{quoted([name for name, _ in short])} (smallest: {min(c for _, c in short)}); "
            "use fewer shots or add images"
        )
    rows = []
    for position, value in enumerate(values):
        members = np.flatnonzero(truth == value)
        rows.append(keyed_generator(seed, "shots", trial, position).permutation(members)[:shots])
    return np.stack(rows).astype(np.int64)


class LabeledDraws:
    """The labeled images of all runs over several K and trials, checked before any training.

    Args:
        paths: training images to draw from.
        labels: their labels [N].
        test_labels: labels [Q] of the test set.
        shots: the values of K.
        trials: draws per K.
        seed: seed of the draws.
        classes: class names by label, for messages.

    Raises:
        ValueError: no shots, a class with fewer than K images, only one class, or a test class that is not in training.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: ArrayLike,
        test_labels: ArrayLike,
        *,
        shots: Sequence[int],
        trials: int,
        seed: int,
        classes: Sequence[str],
    ) -> None:
        if not shots:
            raise ValueError("shots is empty; name at least one number of labeled images per class")
        if trials < 1:
            raise ValueError(f"trials={trials!r} is out of range; at least 1 is needed")
        given = as_labels("labels", labels, len(paths))
        self.paths, self.shots = paths, shots
        self.truth = as_labels("test_labels", test_labels)
        check_seen(given, self.truth)
        self.values = np.unique(given)
        draws = [draw_shots(given, max(shots), seed=seed, trial=t, classes=classes) for t in range(trials)]
        self.positions = np.stack(draws)  # [trials, classes, largest K]

    def runs(self, resize: int, device: torch.device) -> Iterator[tuple[int, int, list[Tensor], Tensor]]:
        """(trial, K, labeled images, labels in 0..C-1) per run; a trial's images are decoded once for all K."""
        _, classes, most = self.positions.shape
        for trial, drawn in enumerate(self.positions):
            pool = [image.to(device) for image in decode([self.paths[i] for i in drawn.ravel()], resize)]
            for k in self.shots:
                chosen = np.arange(classes * most).reshape(classes, most)[:, :k].ravel()
                yield trial, k, [pool[i] for i in chosen], torch.arange(classes, device=device).repeat_interleave(k)

    def accuracies(
        self, shots: Sequence[int], predicted: np.ndarray
    ) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
        """(top-1, mean class) accuracies by K, for models with these K; predicted: classes in 0..C-1, [models, Q]."""
        top1: dict[int, list[float]] = {k: [] for k in shots}
        mean_class: dict[int, list[float]] = {k: [] for k in shots}
        for k, answers in zip(shots, self.values[predicted], strict=True):
            top1[k].append(top1_accuracy(answers, self.truth))
            mean_class[k].append(mean_class_accuracy(answers, self.truth))
        return top1, mean_class


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
        """A classifier in training mode on top of a copy of ``backbone``, on the same device."""
        return cls(copy.deepcopy(backbone), classes, seed).to(module_device(backbone)).train()

    def train(self, mode: bool = True) -> Classifier:
        """Set training mode but leave BatchNorm in eval mode: statistics of a few images would be noise."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes], in float32 even under autocast: in bfloat16, classes would tie."""
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
    config: FewShotConfig,
    *,
    size: int,
    precision: Precision = "auto",
    seed: int,
) -> tuple[Classifier, float]:
    """Finetune a copy of ``backbone`` with a new classifier on a few labeled images.

    It uses SGD with momentum 0.9, no weight decay, a cosine schedule to zero over all steps, random crop and flip,
    cross-entropy, and BatchNorm in eval mode.

    Args:
        backbone: the network; it is not changed.
        images: uint8 [3, H, W] each, on the backbone's device.
        labels: [n] int64 in 0..classes-1, on the same device.
        classes: outputs of the classifier.
        config: the recipe.
        size: side of the input, pixels.
        precision: auto (bf16 on a GPU), bf16 or fp32.
        seed: seed of initialization, order and crops.

    Returns:
        the classifier in eval mode and the mean loss of its last epoch.

    Raises:
        UndefinedError: the loss is no longer finite.
    """
    device = module_device(backbone)
    model = Classifier.on(backbone, classes, seed)
    batch = min(config.batch_size, len(images))
    steps = config.epochs * math.ceil(len(images) / batch)
    optimizer, schedule = sgd(model, config.lr, config.backbone_lr, steps)
    total = torch.zeros((), device=device)
    for epoch in range(config.epochs):
        total.zero_()
        generator = keyed_generator(seed, "finetune", epoch)
        order = generator.permutation(len(images))
        shuffled = labels[torch.from_numpy(order).to(device, non_blocking=True)]
        for start in range(0, len(images), batch):
            index = order[start : start + batch]
            views = random_views(
                [images[i] for i in index],
                size,
                generator,
                scale=config.crop_scale,
                flip_p=config.flip_p,
                mean=backbone.mean,
                std=backbone.std,
            )
            with autocast(device, precision):
                logits = model(views)
            loss = F.cross_entropy(logits, shuffled[start : start + batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(index)
    last = float(total) / len(images)
    if not math.isfinite(last):
        raise diverged("few-shot finetuning", last, config)
    return model.eval(), last


def diverged(what: str, loss: float, config: FewShotConfig) -> UndefinedError:
    """The error for a finetuning whose loss is no longer finite."""
    return UndefinedError(
        f"{what} diverged (the last epoch's loss is {loss}) at fewshot.lr={config.lr:g}, "
        f"fewshot.backbone_lr={config.backbone_lr:g}; lower them"
    )


@torch.no_grad()
def predict(
    models: Sequence[nn.Module], stream: Iterable[tuple[Tensor, Tensor | None]], precision: Precision = "auto"
) -> np.ndarray:
    """Labels [models, N] predicted by several models in one pass over a stream of (images, labels)."""
    device = module_device(models[0])
    batches = []
    for images, _ in stream:
        images = images.to(device, non_blocking=True)
        with autocast(device, precision):
            batches.append(torch.stack([model(images).argmax(1) for model in models]))
    return torch.cat(batches, dim=1).cpu().numpy()


def fewshot(
    backbone: Backbone,
    train_paths: Sequence[str],
    train_labels: ArrayLike,
    test: Iterable[tuple[Tensor, Tensor | None]],
    test_labels: ArrayLike,
    *,
    config: FewShotConfig | None = None,
    size: int = 224,
    resize: int = 256,
    precision: Precision = "auto",
    trials: int = 3,
    seed: int = 0,
    classes: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> FewShotResult:
    """Test accuracy after finetuning on K labeled images per class, for several K and trials.

    Each trial decodes its largest draw once, and smaller K reuse its first images. All finetuned models share one pass over
    the test stream, so test images are also decoded once.

    Args:
        backbone: the network, on the device to work on; it is not changed.
        train_paths: training images to draw from.
        train_labels: their labels [N].
        test: stream of (images, labels) of the test set, normalized for this backbone.
        test_labels: labels [Q] in the stream's order; every class must occur in training.
        config: values of K and the recipe; None takes the paper's.
        size: side of the input, pixels.
        resize: shorter side of decoded images, pixels.
        precision: auto (bf16 on a GPU), bf16 or fp32.
        trials: draws per K.
        seed: seed of draws, initialization, order and crops.
        classes: class names by label, for messages.
        progress: is told how many runs are done, and of how many.

    Raises:
        ValueError: no shots, a class with fewer than K images, only one class, or a test class that is not in training.
        UndefinedError: finetuning diverged for every K; if only some diverged, ``undefined`` names them.
    """
    recipe = config or FewShotConfig()
    drawn = LabeledDraws(
        train_paths, train_labels, test_labels, shots=recipe.shots, trials=trials, seed=seed, classes=classes
    )
    found: dict[int, list[tuple[nn.Module, float]]] = {k: [] for k in recipe.shots}
    undefined: dict[int, str] = {}
    for done, (trial, k, images, labels) in enumerate(drawn.runs(resize, module_device(backbone))):
        if progress:
            progress(done, trials * len(recipe.shots))
        if k in undefined:
            continue
        key = keyed_seed(seed, "fewshot", trial, k)
        count = len(drawn.values)
        try:
            found[k].append(finetune(backbone, images, labels, count, recipe, size=size, precision=precision, seed=key))
        except UndefinedError as error:
            undefined[k] = str(error)
            del found[k]
    if progress:
        progress(trials * len(recipe.shots), trials * len(recipe.shots))
    if not found:
        raise UndefinedError(next(iter(undefined.values())))
    runs = [(k, model) for k, trained in found.items() for model, _ in trained]
    predicted = predict([model for _, model in runs], test, precision)
    top1, mean_class = drawn.accuracies([k for k, _ in runs], predicted)
    losses = {k: [loss for _, loss in trained] for k, trained in found.items()}
    return FewShotResult(top1, mean_class, losses, drawn.positions, undefined)
