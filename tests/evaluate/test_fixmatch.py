"""FixMatch: the loss computed by hand, draws, the use of unlabeled images, and errors."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastuft.config import FewShotConfig, SemiConfig
from fastuft.data import EvalStream, Loading, StrongConfig
from fastuft.evaluate import draws, fewshot, fixmatch
from fastuft.evaluate.semi_supervised import unlabeled_loss

LOADING = Loading((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), threads=1)
RATES = FewShotConfig(shots=[1, 2], epochs=4, lr=0.5, backbone_lr=1e-3, crop_scale=(1, 1), flip_p=0)
COMMON = {"trials": 2, "seed": 3, "size": 16, "resize": 16}


def quick(*shots, **changes):
    return SemiConfig(**{"shots": list(shots), "epochs": 4, "batch_size": 2, "threshold": 0.5} | changes)


class SmallNet(nn.Module):
    """Mean color after a convolution."""

    num_features, mean, std = 8, LOADING.mean, LOADING.std

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x))).mean((2, 3))


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """(paths, labels) of 10 training and 6 test images of each of three colors."""
    root = tmp_path_factory.mktemp("colors")
    generator = np.random.default_rng(0)
    parts = []
    for part, count in (("train", 10), ("test", 6)):
        paths, labels = [], []
        for label in range(3):
            for index in range(count):
                pixels = generator.integers(0, 60, (18, 16, 3))
                pixels[:, :, label] += 150
                paths.append(str(root / f"{part}-{label}-{index}.png"))
                labels.append(label)
                Image.fromarray(pixels.astype("uint8")).save(paths[-1])
        parts.append((paths, labels))
    return parts


def run(colors, backbone=None, train=None, test=None, **changes):
    (paths, labels), (test_paths, test_labels) = train or colors[0], test or colors[1]
    stream = EvalStream(test_paths, size=16, resize=16, batch_size=5, loading=LOADING)
    strong = StrongConfig(ops=("identity", "translate_x"), num_ops=1, cutout=0.25)
    options = {"config": quick(1, 2), "finetuning": RATES, "strong": strong, **COMMON, **changes}
    return fixmatch(backbone or SmallNet(), paths, labels, stream, test_labels, **options)


def test_the_unlabeled_loss_by_hand():
    weak = torch.tensor([[math.log(0.96), math.log(0.04)], [math.log(0.6), math.log(0.4)]], requires_grad=True)
    strong = torch.tensor([[0.0, math.log(3.0)], [5.0, -5.0]], requires_grad=True)
    loss, counted = unlabeled_loss(weak, strong, 0.95)
    # The first image counts alone: CE(strong, class 0) = -log(1 / (1 + 3)), over both images.
    assert loss.item() == pytest.approx(math.log(4.0) / 2)
    assert counted.item() == 0.5
    loss.backward()
    assert weak.grad is None and strong.grad[1].abs().max() == 0
    assert strong.grad[0].tolist() == pytest.approx([(0.25 - 1) / 2, 0.75 / 2])


def test_separable_colors_are_learned_and_the_backbone_is_unchanged(colors):
    backbone = SmallNet()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    result = run(colors, backbone, config=quick(2, threshold=0.4))
    assert result.top1[2] == [1.0, 1.0] and result.mean_class[2] == [1.0, 1.0]
    assert all(0 <= share <= 1 for share in result.confident[2])
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_draws_equal_those_of_few_shot_finetuning(colors):
    (paths, labels), (test_paths, test_labels) = colors
    stream = EvalStream(test_paths, size=16, resize=16, batch_size=5, loading=LOADING)
    plain = fewshot(SmallNet(), paths, labels, stream, test_labels, config=RATES, **COMMON)
    np.testing.assert_array_equal(run(colors).draws, plain.draws)


def test_results_depend_on_the_seed_only(colors):
    first, again, other = run(colors), run(colors), run(colors, seed=4)
    assert first.train_loss == again.train_loss and first.top1 == again.top1
    assert first.train_loss != other.train_loss


def test_unlabeled_images_count_only_above_the_threshold(colors):
    none = run(colors, config=quick(1, 2, threshold=1.1))
    assert none.confident == {1: [0.0, 0.0], 2: [0.0, 0.0]}
    weightless = run(colors, config=quick(1, 2, threshold=0.0, weight=0.0))
    assert weightless.confident == {1: [1.0, 1.0], 2: [1.0, 1.0]}
    assert weightless.train_loss == none.train_loss  # without its weight the unlabeled loss changes nothing
    assert run(colors, config=quick(1, 2, threshold=0.0)).train_loss != none.train_loss


def test_labels_of_the_unlabeled_images_are_not_used(colors):
    paths, labels = colors[0]
    first = run(colors, config=quick(1), trials=1)
    drawn = set(first.draws.ravel().tolist())
    # The labels of all images that were not drawn change places; classes and their sizes stay.
    others = [i for i in range(len(labels)) if i not in drawn]
    assert len(others) > 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "draw_shots", lambda *_, **__: first.draws[0])
        mixed = list(labels)
        for i, j in zip(others, reversed(others), strict=True):
            mixed[i] = labels[j]
        again = run(colors, train=(paths, mixed), config=quick(1), trials=1)
    assert again.train_loss == first.train_loss and again.top1 == first.top1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": quick(11)}, r"11 shots need 11 training images of every class"),
        ({"test": "absent"}, "absent|not in|unknown|train"),
        ({"train": "one"}, "class"),
        ({"finetuning": dataclasses.replace(RATES, lr=1e30)}, "diverged"),
    ],
)
def test_impossible_settings_are_refused(colors, changes, words):
    (paths, labels), (test_paths, test_labels) = colors
    if changes.get("test") == "absent":
        changes = {"test": (test_paths, [label + 5 for label in test_labels])}
    if changes.get("train") == "one":
        changes = {"train": (paths, [0] * len(labels)), "test": (test_paths, [0] * len(test_labels))}
    with pytest.raises(ValueError, match=words):
        run(colors, **changes)
