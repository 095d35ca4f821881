"""Few-shot accuracy of the nearest class mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastuft.evaluate import UndefinedError, draw_shots, prototype_accuracy


def clusters(seed=0, count=12, classes=5, noise=0.8):
    """Features [classes * count, 16] around one direction per class, and their labels, shuffled."""
    generator = np.random.default_rng([seed, count])
    labels = generator.permutation(np.repeat(np.arange(classes), count))
    centers = np.random.default_rng(7).normal(size=(classes, 16))
    return centers[labels] + noise * generator.normal(size=(len(labels), 16)), labels


def by_hand(train_x, train_y, test_x, test_y, shots, trial):
    """The same accuracy by loops over classes and queries."""
    rows = draw_shots(train_y, shots, seed=3, trial=trial)
    means = []
    for row in rows:
        units = [train_x[i] / np.linalg.norm(train_x[i]) for i in row]
        mean = np.sum(units, 0)
        means.append(mean / np.linalg.norm(mean))
    names = sorted(set(train_y))
    predicted = [names[int(np.argmax([query @ mean for mean in means]))] for query in test_x]
    right = [[p == t for p, t in zip(predicted, test_y, strict=True) if t == name] for name in sorted(set(test_y))]
    return float(np.mean([np.mean(one) for one in right]))


@pytest.mark.parametrize("shots", [1, 2, 4])
def test_it_is_the_nearest_mean_of_unit_features(shots):
    train_x, train_y = clusters()
    test_x, test_y = clusters(1, count=20)
    test_x, test_y = test_x[:70], test_y[:70]  # classes of different sizes
    found = prototype_accuracy(train_x, train_y, test_x, test_y, shots, trials=4, seed=3)
    wanted = [by_hand(train_x, train_y, test_x, test_y, shots, trial) for trial in range(4)]
    np.testing.assert_allclose(found, wanted)
    assert min(found) > 0.3 and len(set(found)) > 1


def test_norms_of_features_have_no_influence():
    (train_x, train_y), (test_x, test_y) = clusters(), clusters(1)
    scale = np.random.default_rng(0).uniform(0.01, 100, (len(train_x), 1))
    plain = prototype_accuracy(train_x, train_y, test_x, test_y, 4)
    assert prototype_accuracy(scale * train_x, train_y, 1000 * test_x, test_y, 4) == plain


def test_more_labeled_images_help_and_names_are_labels():
    (train_x, train_y), (test_x, test_y) = clusters(noise=2), clusters(1, noise=2)
    names = np.array(["ant", "bee", "cat", "dog", "elk"])
    means = [np.mean(prototype_accuracy(train_x, names[train_y], test_x, names[test_y], k)) for k in (1, 4, 12)]
    assert means == sorted(means) and means[2] > means[0] + 0.1
    alone = np.flatnonzero(test_y != 4)  # a class that is not tested is still a wrong answer
    assert 0.5 < np.mean(prototype_accuracy(train_x, train_y, test_x[alone], test_y[alone], 12)) < 1


def test_half_precision_features_are_taken():
    (train_x, train_y), (test_x, test_y) = clusters(noise=0.1), clusters(1, noise=0.1)
    halves = (torch.tensor(x, dtype=torch.bfloat16) for x in (train_x, test_x))
    first, second = halves
    assert prototype_accuracy(first, train_y, second, test_y, 2, trials=1) == [1.0]


def test_what_cannot_be_measured_is_refused():
    (train_x, train_y), (test_x, test_y) = clusters(), clusters(1)
    with pytest.raises(ValueError, match="13 shots need 13 training images"):
        prototype_accuracy(train_x, train_y, test_x, test_y, 13)
    with pytest.raises(ValueError, match="trials=0"):
        prototype_accuracy(train_x, train_y, test_x, test_y, 1, trials=0)
    with pytest.raises(ValueError, match="train_x has 16 features and test_x has 9"):
        prototype_accuracy(train_x, train_y, test_x[:, :9], test_y, 1)
    with pytest.raises(UndefinedError, match="collapsed"):
        prototype_accuracy(np.ones_like(train_x), train_y, test_x, test_y, 1)
