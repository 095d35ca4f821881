"""One undefined metric never loses an evaluation: what fails is stated, and the others stay whole."""

from __future__ import annotations

import json
import math

import pytest
import torch
from image_folders import ColorNet, write_images

from fastuft.config import ClusteringConfig, EvalConfig, FewShotConfig, MapConfig, SemiConfig
from fastuft.evaluate import evaluate_backbone, write_evaluation
from fastuft.evaluate.sections import Context, Part, Section, run_sections


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    names = ["blue", "green", "red"]
    return {
        "train": write_images(root / "train", names, 4, 0),
        "test": write_images(root / "test", names, 3, 1),
        "source": write_images(root / "source", ["a", "b"], 4, 2),
    }


def evaluate(folders, backbone=None, before=None, **changes):
    config = EvalConfig(
        checkpoint="none",
        **folders,
        size=16,
        resize=16,
        trials=1,
        clustering=ClusteringConfig(restarts=1),
        gallery=2,
        loader="torch",
        device="cpu",
        **{"fewshot": FewShotConfig(shots=[1], epochs=2, crop_scale=(1, 1)), **changes},
    )
    return evaluate_backbone(backbone or ColorNet(), config, before)


class Collapsed(ColorNet):
    """The same features for every image."""

    def forward(self, x):
        return super().forward(x) * 0 + torch.arange(1.0, 7.0)


def test_collapsed_features_are_stated_and_the_rest_is_measured(folders, tmp_path):
    result = evaluate(folders, Collapsed(), before=ColorNet(1))
    metrics = result.metrics
    assert {"Clustering accuracy", "Retrieval accuracy", "CKA of the target", "CKA of the source"} <= set(
        metrics["not_known"]
    )
    assert "clustering" not in metrics and "retrieval" not in metrics
    assert metrics["before"]["retrieval"] > 0.7 and metrics["forgetting"].keys() == {"before"}
    assert metrics["label_free"]["target_drift"].keys() == {"mean_cosine"}
    assert metrics["label_free"]["alignment"] == pytest.approx(0, abs=1e-10)
    assert any("the network has collapsed" in said for said in metrics["statements"])
    write_evaluation(tmp_path, result)
    assert json.loads((tmp_path / "eval.json").read_text())["not_known"] == metrics["not_known"]


def test_a_diverged_finetuning_keeps_the_other_sections(folders):
    metrics = evaluate(
        folders,
        fewshot=FewShotConfig(shots=[1], epochs=5, lr=1e38, backbone_lr=1e38),
        semi=SemiConfig(shots=[1], epochs=3, batch_size=4),
    ).metrics
    assert "fewshot" not in metrics and "fixmatch" not in metrics
    assert set(metrics["not_known"]) == {"Few-shot accuracy", "FixMatch accuracy"}
    assert "diverged" in metrics["not_known"]["FixMatch accuracy"] and metrics["retrieval"] > 0.7


def test_impossible_shots_are_dropped_and_possible_ones_kept(folders):
    metrics = evaluate(folders, fewshot=FewShotConfig(shots=[1, 4, 9], epochs=1)).metrics
    assert set(metrics["fewshot"]) == {"1", "4"}
    assert metrics["not_known"] == {
        "9-shot accuracy": "it needs 9 training images of every class, but class 'blue' has only 4"
    }


def test_one_image_per_class(folders, tmp_path):
    small = folders | {"train": write_images(tmp_path, ["blue", "green", "red"], 1, 0)}
    metrics = evaluate(small).metrics
    assert "only one image" in metrics["not_known"]["Clustering accuracy"]
    assert (
        metrics["not_known"]["Retrieval accuracy"]
        == "it needs the 5 nearest neighbors, but there are only 3 images to choose from"
    )
    assert math.isfinite(metrics["fewshot"]["1"]["top1"]["mean"])


def test_three_images_without_labels(tmp_path):
    folder = write_images(tmp_path, ["flat"], 3, 0) + "/flat"
    result = evaluate({"train": folder}, before=ColorNet(1))
    assert "needs at least 5 images, got 3" in result.metrics["not_known"]["The map"]
    assert set(result.metrics["not_known"]) == {"The map", "The share of neighbors kept", "Agreement of views"}
    assert result.arrays["neighbors"].shape == (2, 2)


def test_the_larger_draw_is_kept(folders):
    both = {"fewshot": FewShotConfig(shots=[3], epochs=1), "semi": SemiConfig(shots=[1], epochs=1, batch_size=4)}
    draws = evaluate(folders, map=MapConfig(points=0), **both).draws
    assert [len(files) for files in draws["0"].values()] == [3, 3, 3]


def context_for(folders):
    config = EvalConfig(checkpoint="none", train=folders["train"], device="cpu")
    return Context(config, None, {}, 32)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, MemoryError, OSError, ZeroDivisionError])
def test_a_section_that_fails_is_stated(folders, error):
    def fails(_):
        raise error("so it\nwent.")

    sections = (Section("one", "The first", fails), Section("two", "The second", lambda _: Part({"value": 1.0})))
    context = context_for(folders)
    whole = run_sections(context, sections)
    assert whole.metrics == {"value": 1.0} and whole.statements == ["The first is not known: so it went."]
    assert set(context.timings) == {"one", "two"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError])
def test_bugs_and_interrupts_are_raised(folders, error):
    def fails(_):
        raise error

    with pytest.raises(error):
        run_sections(context_for(folders), (Section("one", "The first", fails),))


def test_a_non_finite_value_is_stated():
    part = Part()
    part.put({"mean": float("nan"), "trials": []}, "forgetting", "after")
    assert part.metrics == {} and part.not_known == {"forgetting after": "it is not a finite number"}
