"""Few-shot accuracy without training: the nearest class mean of K labeled images."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from fastuft.evaluate.accuracy import mean_class_accuracy
from fastuft.evaluate.draws import draw_shots
from fastuft.evaluate.inputs import ArrayLike, as_features, as_labels, check_seen, check_varied


def prototype_accuracy(
    train_x: ArrayLike,
    train_y: ArrayLike,
    test_x: ArrayLike,
    test_y: ArrayLike,
    shots: int,
    *,
    trials: int = 20,
    seed: int = 0,
) -> list[float]:
    """Mean class accuracy of the nearest class mean, by cosine, of ``shots`` labeled items per class.

    The means are those of unit features (SimpleShot, Wang et al. 2019, without centering). Nothing is trained, so there is no
    learning rate that suits one backbone and not another: backbones of any scale can be compared, in seconds.

    Args:
        train_x: features [N, F] to draw from: NumPy array, tensor or nested sequence.
        train_y: labels [N], integers or strings.
        test_x: features [Q, F].
        test_y: labels [Q]; every class must occur in ``train_y``.
        shots: K.
        trials: draws; those of :func:`fastuft.evaluate.fewshot` with the same seed.
        seed: seed of the draws.

    Returns:
        One fraction in [0, 1] per trial.

    Raises:
        ValueError: shapes disagree, features are not finite, there is only one class, a test class is not in training, a class
            has fewer than K items, or no trials.
        UndefinedError: the training features are all the same.
    """
    if trials < 1:
        raise ValueError(f"trials={trials!r} is out of range; at least 1 is needed")
    train, test = (as_features(name, x) for name, x in (("train_x", train_x), ("test_x", test_x)))
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train_x has {train.shape[1]} features and test_x has {test.shape[1]}; they must agree")
    given, truth = as_labels("train_y", train_y, len(train)), as_labels("test_y", test_y, len(test))
    check_seen(given, truth)
    check_varied("train_x", train)
    values = np.unique(given)
    gallery, queries = F.normalize(train, dim=1), F.normalize(test, dim=1)

    def of(trial: int) -> float:
        drawn = torch.from_numpy(draw_shots(given, shots, seed=seed, trial=trial))
        means = F.normalize(gallery[drawn].mean(1), dim=1)
        return mean_class_accuracy(values[(queries @ means.T).argmax(1).cpu().numpy()], truth)

    return [of(trial) for trial in range(trials)]
