"""Few-shot finetuning: draws, recipe, shared decoding, and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastuft.config import FewShotConfig, SemiConfig
from fastuft.evaluate import UndefinedError, draw_shots, few_shot, fewshot, fixmatch
from fastuft.evaluate.classifier import Classifier, predict
from fastuft.evaluate.few_shot import finetune
from fastuft.evaluate.images import decode, normalize, random_views, thumbnail_png

CLASSES = 3
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SIDE = {"size": 16, "resize": 16}


def quick(*shots, **changes):
    return FewShotConfig(
        **{"shots": list(shots), "epochs": 6, "lr": 1.0, "crop_scale": (1.0, 1.0), "flip_p": 0.0} | changes
    )


class SmallNet(nn.Module):
    """A few convolutions with BatchNorm on colors."""

    num_features, mean, std = 8, MEAN, STD

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x))).mean((2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three colors with noise: 6 training and 4 test images per class."""
    root = tmp_path_factory.mktemp("colors")
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 4)):
        for c in range(CLASSES):
            for i in range(count):
                pixels = rng.integers(0, 60, (20, 16, 3))
                pixels[:, :, c] += 150
                path = root / part / f"c{c}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype("uint8")).save(path)
    return root


def paths_and_labels(root, part):
    paths = [str(p) for p in sorted((root / part).rglob("*.png"))]
    return paths, [int(p.split("/c")[-1][0]) for p in paths]


def eval_stream(paths, labels):
    pool = [image[:, 2:18] for image in decode(paths, 16)]
    for start in range(0, len(paths), 5):
        batch = normalize(torch.stack(pool[start : start + 5]).float(), MEAN, STD)
        yield batch, torch.tensor(labels[start : start + 5])


def test_draws_are_seeded_nested_and_balanced():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 9))
    eight, two = draw_shots(labels, 8, seed=3), draw_shots(labels, 2, seed=3)
    assert eight.shape == (5, 8)
    np.testing.assert_array_equal(eight[:, :2], two)
    np.testing.assert_array_equal(labels[eight], np.arange(5)[:, None].repeat(8, 1))
    assert len(np.unique(eight)) == 40
    assert not np.array_equal(eight, draw_shots(labels, 8, seed=3, trial=1))
    assert not np.array_equal(eight, draw_shots(labels, 8, seed=4))


def test_finetuning_learns_and_leaves_the_backbone_alone(folder):
    backbone = SmallNet()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    train, test = paths_and_labels(folder, "train"), paths_and_labels(folder, "test")
    result = fewshot(backbone, *train, eval_stream(*test), test[1], config=quick(1, 4), trials=2, **SIDE)
    assert result.draws.shape == (2, CLASSES, 4)
    assert {k: len(v) for k, v in result.top1.items()} == {1: 2, 4: 2}
    assert min(result.top1[4]) >= 0.9
    assert result.top1[4] == pytest.approx(result.mean_class[4])  # as many test images in each class
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_results_repeat_with_the_seed(folder):
    train, test = paths_and_labels(folder, "train"), paths_and_labels(folder, "test")
    first, again = (
        fewshot(SmallNet(), *train, eval_stream(*test), test[1], config=quick(1), trials=2, seed=5, **SIDE)
        for _ in range(2)
    )
    assert first.top1 == again.top1


def test_recipe_is_sgd_with_two_rates_and_a_cosine(folder, monkeypatch):
    seen = []
    original = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        seen.append([(g["lr"], g["momentum"], g["weight_decay"]) for g in self.param_groups])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    paths, labels = paths_and_labels(folder, "train")
    settings = FewShotConfig(epochs=4, batch_size=10)
    finetune(SmallNet(), decode(paths, 16), torch.tensor(labels), CLASSES, settings, size=16, seed=0)
    assert len(seen) == 4 * 2  # 18 images in batches of 10 and 8
    for index, (backbone, classifier) in enumerate(seen):
        factor = (1 + np.cos(np.pi * index / 8)) / 2
        assert backbone == pytest.approx((1e-4 * factor, 0.9, 0.0))
        assert classifier == pytest.approx((3.0 * factor, 0.9, 0.0))


def test_batchnorm_stays_in_eval_mode_but_learns(folder):
    paths, labels = paths_and_labels(folder, "train")
    model, loss = finetune(SmallNet(), decode(paths, 16), torch.tensor(labels), CLASSES, quick(), size=16, seed=0)
    assert 0 < loss < np.log(CLASSES)
    assert torch.equal(model.backbone.bn.running_mean, torch.zeros(8))
    assert not torch.equal(model.backbone.bn.weight, torch.ones(8))
    assert not Classifier(SmallNet(), CLASSES, 0).train().backbone.bn.training


def test_several_models_share_one_pass_over_the_images(folder):
    paths, labels = paths_and_labels(folder, "test")
    passes = []

    def stream():
        passes.append(1)
        yield from eval_stream(paths, labels)

    models = [Classifier(SmallNet(), CLASSES, seed).eval() for seed in range(3)]
    together = predict(models, stream())
    assert together.shape == (3, len(paths)) and len(passes) == 1
    np.testing.assert_array_equal(together[1], predict(models[1:2], stream())[0])


def test_views_without_crop_and_flip_equal_the_image():
    image = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8)
    generator = np.random.default_rng(0)
    view = random_views([image], 12, generator, scale=(1.0, 1.0), flip_p=0.0, mean=MEAN, std=STD)
    torch.testing.assert_close(view[0], ((image / 255) - 0.5) / 0.25)
    flipped = random_views([image], 12, generator, scale=(1.0, 1.0), flip_p=1.0, mean=MEAN, std=STD)
    torch.testing.assert_close(flipped, view.flip(3))


def test_decoding_keeps_aspect_ratio_and_order(tmp_path):
    for name, size in (("a.png", (50, 20)), ("b.jpg", (20, 50)), ("c.png", (10, 10))):
        Image.new("L" if name == "c.png" else "RGB", size, 100).save(tmp_path / name)
    shapes = [tuple(i.shape) for i in decode([str(tmp_path / n) for n in ("a.png", "b.jpg", "c.png")], 16)]
    assert shapes == [(3, 16, 40), (3, 40, 16), (3, 16, 16)]


def test_thumbnails_are_png_files(tmp_path):
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "a.jpg")
    data = thumbnail_png(str(tmp_path / "a.jpg"))
    assert data.dtype == np.uint8 and data.tobytes().startswith(b"\x89PNG")


def run_with(folder, train_labels=None, test_labels=None, config=None):
    train, test = paths_and_labels(folder, "train"), paths_and_labels(folder, "test")
    train_labels = train[1] if train_labels is None else train_labels
    test_labels = test[1] if test_labels is None else test_labels
    stream = eval_stream(*test)
    return fewshot(SmallNet(), train[0], train_labels, stream, test_labels, config=config or quick(1), trials=1, **SIDE)


def test_too_few_images_per_class_name_the_class():
    with pytest.raises(ValueError, match=r"8 shots need .* but 1 of 2 classes have fewer: 'pug'"):
        draw_shots([0] * 9 + [1] * 3, 8, seed=0, classes=["cat", "pug"])


def test_unseen_test_class_and_single_class_are_refused(folder):
    with pytest.raises(ValueError, match="test classes without training examples: 9"):
        run_with(folder, test_labels=[0] * 11 + [9])
    with pytest.raises(ValueError, match="only one class"):
        run_with(folder, train_labels=[0] * 18)


@pytest.mark.parametrize(("run", "recipe"), [(fewshot, FewShotConfig), (fixmatch, SemiConfig)])
def test_an_empty_draw_is_refused(folder, run, recipe):
    (paths, labels), test = paths_and_labels(folder, "train"), paths_and_labels(folder, "test")
    with pytest.raises(ValueError, match="shots is empty; name at least one"):
        run(SmallNet(), paths, labels, eval_stream(*test), test[1], config=recipe(shots=[]))
    with pytest.raises(ValueError, match="trials=0 is out of range"):
        run(SmallNet(), paths, labels, eval_stream(*test), test[1], config=recipe(shots=[1]), trials=0)


def test_logits_are_float32_under_autocast():
    model = Classifier(SmallNet(), 1000, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(4, 3, 16, 16))
    assert logits.dtype == torch.float32
    assert all(len(row.unique()) > 990 for row in logits)  # bfloat16 has a few hundred values in their range


def test_a_diverged_finetuning_is_reported(folder):
    with pytest.raises(UndefinedError, match=r"diverged .* at fewshot\.lr=1e\+30"):
        run_with(folder, config=quick(1, lr=1e30, backbone_lr=1e30))


def test_a_diverged_finetuning_keeps_those_of_other_shots(folder, monkeypatch):
    def diverges_for_two(backbone, images, *arguments, **options):
        if len(images) == 2 * CLASSES:
            raise UndefinedError("few-shot finetuning diverged")
        return finetune(backbone, images, *arguments, **options)

    monkeypatch.setattr(few_shot, "finetune", diverges_for_two)
    result = run_with(folder, config=quick(1, 2, 4))
    assert set(result.top1) == set(result.mean_class) == set(result.train_loss) == {1, 4}
    assert result.undefined == {2: "few-shot finetuning diverged"}


def test_runs_that_end_above_half_the_loss_of_guessing_are_unsettled():
    losses = {1: [0.1, 0.6], 2: [0.5, 0.5], 4: [0.9, 0.1]}  # guessing between 3 classes: 1.1
    result = few_shot.FewShotResult({}, {}, losses, np.zeros((2, 3, 4), np.int64))
    assert result.unsettled == [1, 4]


def test_unreadable_image_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png.*verify-data"):
        decode([str(tmp_path / "broken.png")], 16)
