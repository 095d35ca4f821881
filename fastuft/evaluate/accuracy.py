"""Classification accuracy over predicted labels, as fractions."""

from __future__ import annotations

import numpy as np

from fastuft.evaluate.inputs import ArrayLike, as_labels


def top1_accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Share of items whose prediction is their label, both [N] (CIFAR-100 and Food-101 in the paper)."""
    truth = as_labels("labels", labels)
    return float(np.mean(as_labels("predicted", predicted, len(truth)) == truth))


def mean_class_accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the classes in ``labels`` of each class's accuracy, both [N] (Pet and Caltech101 in the paper)."""
    truth = as_labels("labels", labels)
    right = as_labels("predicted", predicted, len(truth)) == truth
    _, of = np.unique(truth, return_inverse=True)
    return float(np.mean(np.bincount(of, weights=right) / np.bincount(of)))
