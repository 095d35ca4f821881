"""Few-shot accuracy by finetuning the backbone with a new classifier (the paper's main metric)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastuft.config import FewShotConfig
from fastuft.device import Precision, autocast
from fastuft.evaluate.classifier import Classifier, diverged, predict, sgd
from fastuft.evaluate.draws import LabeledDraws
from fastuft.evaluate.features import module_device
from fastuft.evaluate.images import random_views
from fastuft.evaluate.inputs import ArrayLike, UndefinedError
from fastuft.model import Backbone
from fastuft.randomness import keyed_generator, keyed_seed


@dataclass(frozen=True)
class FewShotResult:
    """The accuracies of all few-shot runs of one backbone, as fractions.

    Args:
        top1: top-1 accuracy of each trial, by K.
        mean_class: mean class accuracy of each trial, by K.
        train_loss: mean cross-entropy of each trial's last epoch, by K.
        draws: indices into the training set, [trials, classes, largest K] int64; K shots are ``draws[t, :, :K]``.
        undefined: why a K has no accuracy (its finetuning diverged); such a K is missing from the other fields.
    """

    top1: dict[int, list[float]]
    mean_class: dict[int, list[float]]
    train_loss: dict[int, list[float]]
    draws: np.ndarray
    undefined: dict[int, str] = field(default_factory=dict)

    @property
    def unsettled(self) -> list[int]:
        """Values of K for which a trial ended with more than half the loss of guessing, log(classes).

        There the learning rates do not suit the backbone, and the accuracies say little about it. A few images are easily
        fitted: of an ImageNet network on 30 photographs the loss was 2.9 (guessing: 3.4) at a rate of 3.0, at which 14 % of
        test images were right, and 0.0 at 0.3 with 65 %.
        """
        limit = math.log(self.draws.shape[1]) / 2
        return [k for k, losses in self.train_loss.items() if max(losses) > limit]


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
        progress: called with (runs done, total runs).

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
