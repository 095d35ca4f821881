"""Which labeled images few-shot and semi-supervised runs train on, and the accuracy of their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastuft.evaluate.accuracy import mean_class_accuracy, top1_accuracy
from fastuft.evaluate.images import decode
from fastuft.evaluate.inputs import ArrayLike, as_labels, check_seen, quoted
from fastuft.randomness import keyed_generator


def draw_shots(
    labels: ArrayLike, shots: int, *, seed: int, trial: int = 0, classes: Sequence[object] = ()
) -> np.ndarray:
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
