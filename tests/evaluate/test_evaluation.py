"""Evaluation of a backbone on folders: what each combination of folders measures, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import ColorNet, write_images

from fastuft.config import ClusteringConfig, EvalConfig, FewShotConfig, MapConfig
from fastuft.evaluate import Evaluation, evaluate_backbone, write_evaluation
from fastuft.runfolder import RunFolder

QUICK = FewShotConfig(shots=[1, 2], epochs=6, lr=10.0, crop_scale=(0.5, 1.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    names = ["red", "green", "<blue>"]
    return {
        "train": write_images(root / "train", names, 8, 0),
        "test": write_images(root / "test", names, 5, 1),
        "source": write_images(root / "source", ["a", "b"], 6, 2),
        "flat": write_images(root, ["flat"], 9, 3) + "/flat",
    }


def config(folders, **changes):
    values = {
        "checkpoint": "none",
        "train": folders["train"],
        "test": folders["test"],
        "size": 16,
        "resize": 16,
        "batch_size": 7,
        "trials": 2,
        "fewshot": QUICK,
        "clustering": ClusteringConfig(restarts=2),
        "gallery": 4,
        "loader": "torch",
        "device": "cpu",
    }
    return EvalConfig(**(values | changes))


@pytest.fixture(scope="module")
def told():
    """The progress that the evaluation of ``full`` reported."""
    return []


@pytest.fixture(scope="module")
def full(folders, told):
    options = config(folders, source=folders["source"])
    return evaluate_backbone(ColorNet(), options, before=ColorNet(1), progress=lambda *said: told.append(said))


def test_every_long_part_reports_progress_to_the_end(full, told):
    last = {part: (done, total) for part, done, total in told}
    images = {"train": 24, "test": 15, "source": 12}
    assert all(
        last[f"features of {name}, {arm}"] == (n, n) for name, n in images.items() for arm in ("after", "before")
    )
    assert last["K-means on train, after"] == (2, 2) and last["few-shot runs, after"] == (4, 4)
    assert all(done <= total for _, done, total in told)
    steps = [done for part, done, _ in told if part == "features of train, after"]
    assert steps == [7, 14, 21, 24]


def test_labeled_folders_give_every_metric(full):
    metrics = full.metrics
    assert metrics["labeled"] and metrics["classes"] == ["<blue>", "green", "red"]
    assert metrics["counts"] == {"train": 24, "test": 15, "source": 12}
    assert 0 <= metrics["retrieval"] <= 1 and len(metrics["clustering"]["trials"]) == 2
    assert set(metrics["fewshot"]) == {"1", "2"}
    assert set(metrics["fewshot"]["2"]) == {"top1", "mean_class", "train_loss"}
    assert set(metrics["fewshot"]["2"]["mean_class"]) == {"mean", "std", "trials"}
    assert set(metrics["before"]) == {"retrieval", "clustering", "class_means"}
    assert set(metrics["class_means"]) == set(metrics["before"]["class_means"]) == {"1", "2"}
    assert len(metrics["class_means"]["2"]["trials"]) == 20 and metrics["class_means"]["2"]["mean"] > 0.9
    assert set(metrics["forgetting"]) == {"after", "before"}
    assert set(metrics["source_drift"]) == {"linear_cka", "mean_cosine"}
    assert {"alignment", "uniformity", "before", "neighbor_overlap", "target_drift"} <= set(metrics["label_free"])
    assert metrics["statements"] == []
    assert {"features", "retrieval", "clustering", "fewshot"} <= set(metrics["timings"])


def test_few_shot_accuracy_of_the_start_uses_the_same_draws(folders):
    told = []
    options = config(folders, before_fewshot=True, clustering=ClusteringConfig(restarts=1), map=MapConfig(points=0))
    result = evaluate_backbone(ColorNet(), options, ColorNet(1), lambda *said: told.append(said))
    alone = evaluate_backbone(ColorNet(1), config(folders, map=MapConfig(points=0)))
    assert result.metrics["before"]["fewshot"] == alone.metrics["fewshot"] != result.metrics["fewshot"]
    assert result.draws == alone.draws and ("few-shot runs, before", 4, 4) in told


class Loud(ColorNet):
    """Features of twice the norm, in the same directions."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(("network", "said"), [(Loud, True), (ColorNet, False)])
def test_few_shot_accuracies_at_other_feature_norms_are_doubted(folders, network, said):
    options = config(folders, before_fewshot=True, trials=1, gallery=0, map=MapConfig(points=0))
    metrics = evaluate_backbone(ColorNet(), options, network()).metrics
    assert (
        any("mean norm went from" in line and "fewshot.lr=10 before" in line for line in metrics["statements"]) == said
    )
    assert metrics["before"]["class_means"] == metrics["class_means"]


def test_class_means_need_no_few_shot_runs_and_skip_large_k(folders):
    options = config(folders, fewshot=FewShotConfig(shots=[]), test=folders["train"], train=folders["test"])
    metrics = evaluate_backbone(ColorNet(), options).metrics
    assert set(metrics["class_means"]) == {"1", "2", "4"} and "fewshot" not in metrics  # classes have 5 images
    assert metrics["not_known"] == {}


def test_separable_colors_score_high(full):
    assert full.metrics["retrieval"] > 0.9 and full.metrics["clustering"]["mean"] > 0.9


def test_arrays_contain_map_gallery_and_marks(full):
    arrays = full.arrays
    assert arrays["tsne"].shape == (15, 2) and set(arrays["tsne_labels"]) == {0, 1, 2}
    assert arrays["queries"].shape == (4,)
    names = arrays["thumb_names"]
    for prefix in ("", "before_"):
        assert arrays[f"{prefix}neighbors"].shape == (4, 5)
        for row, query in enumerate(arrays["queries"]):
            own = names[query].split("/")[0]
            same = [names[at].split("/")[0] == own for at in arrays[f"{prefix}neighbors"][row]]
            assert same == arrays[f"{prefix}right"][row].tolist()
    first = arrays["thumb_png"][: arrays["thumb_offsets"][1]].tobytes()
    assert first.startswith(b"\x89PNG") and len(arrays["thumb_offsets"]) == len(names) + 1


def test_written_files_read_back_without_pickle(full, tmp_path):
    write_evaluation(tmp_path / "run", full)
    assert json.loads((tmp_path / "run" / "eval.json").read_text()) == json.loads(json.dumps(full.metrics))
    with np.load(tmp_path / "run" / "eval_arrays.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == set(full.arrays)
        np.testing.assert_array_equal(arrays["thumb_names"], full.arrays["thumb_names"])
    draws = json.loads((tmp_path / "run" / "fewshot_draws.json").read_text())
    assert set(draws) == {"0", "1"} and all(len(files) == 2 for files in draws["0"].values())
    assert all(file.startswith("red/") for file in draws["1"]["red"])


@pytest.mark.parametrize("file", ["eval.json", "eval_arrays.npz", "fewshot_draws.json"])
def test_a_full_disk_names_the_file_and_keeps_the_earlier_evaluation(full, tmp_path, monkeypatch, file):
    write_evaluation(tmp_path, full)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_bytes

    def refuse(path, content):
        if path.name.startswith(file):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    other = Evaluation({"labeled": False}, {"queries": np.zeros(1)}, {"0": {"a": ["a/1.png"]}})
    with pytest.raises(OSError, match="No space left on device; it could not be written") as error:
        write_evaluation(tmp_path, other)
    assert error.value.filename == str(tmp_path / file) and error.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_created_is_named(full, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be written") as error:
        write_evaluation(tmp_path / "file" / "run", full)
    assert error.value.filename == str(tmp_path / "file" / "run")


def test_draws_of_an_earlier_evaluation_are_removed(full, tmp_path):
    write_evaluation(tmp_path, full)
    write_evaluation(tmp_path, dataclasses.replace(full, draws={}))
    assert {path.name for path in tmp_path.iterdir()} == {"eval.json", "eval_arrays.npz"}


def test_non_utf8_names_are_written(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    config_ = config(
        {
            "train": write_images(tmp_path / "train", [name, "$x$"], 3, 0),
            "test": write_images(tmp_path / "test", [name, "$x$"], 3, 1),
        }
    )
    write_evaluation(tmp_path / "run", evaluate_backbone(ColorNet(), config_))
    figures = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert figures["classes"] == ["$x$", "caf\\xe9"] and figures["not_known"] == {}
    assert name in json.loads((tmp_path / "run" / "fewshot_draws.json").read_text())["0"]
    with np.load(tmp_path / "run" / "eval_arrays.npz") as arrays:
        assert any(shown.startswith("caf\\xe9/") for shown in arrays["thumb_names"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused(folders):
    with pytest.raises(ValueError, match="device='cuda' but torch sees no CUDA device"):
        evaluate_backbone(ColorNet(), config(folders, device="cuda"))


def test_figures_are_reproducible_with_the_seed(folders, full):
    again = evaluate_backbone(ColorNet(), config(folders, source=folders["source"]), before=ColorNet(1))
    assert {**again.metrics, "timings": 0} == {**full.metrics, "timings": 0}


def test_the_backbone_is_unchanged(folders):
    backbone = ColorNet().train()
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    evaluate_backbone(backbone, config(folders, fewshot=FewShotConfig(shots=[1], epochs=1), trials=1))
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    assert backbone.training


def test_without_labels_the_report_says_what_is_unknown(folders):
    result = evaluate_backbone(ColorNet(), config(folders, train=folders["flat"], test=None), before=ColorNet(1))
    metrics = result.metrics
    assert not metrics["labeled"] and not {"retrieval", "clustering", "fewshot", "forgetting"} & set(metrics)
    assert "few-shot accuracy are not known" in metrics["statements"][0]
    assert 0 <= metrics["label_free"]["neighbor_overlap"] <= 1
    assert math.isfinite(metrics["label_free"]["uniformity"])
    arrays = result.arrays
    assert "right" not in arrays and set(arrays["tsne_labels"]) == {-1}
    for prefix in ("", "before_"):
        assert not (arrays[f"{prefix}neighbors"] == arrays["queries"][:, None]).any()


def test_without_a_test_set_only_clustering_is_measured(folders):
    metrics = evaluate_backbone(ColorNet(), config(folders, test=None)).metrics
    assert "clustering" in metrics and "retrieval" not in metrics and "fewshot" not in metrics
    assert any("No labeled test set" in s for s in metrics["statements"])
    assert any("No earlier checkpoint" in s for s in metrics["statements"])


def test_unlabeled_test_and_source(folders):
    metrics = evaluate_backbone(
        ColorNet(), config(folders, test=folders["flat"], source=folders["flat"]), before=ColorNet(1)
    ).metrics
    assert not metrics["labeled"] and "forgetting" not in metrics and "source_drift" in metrics
    assert any("source has no class folders" in s for s in metrics["statements"])


def test_few_shot_runs_that_do_not_converge_are_reported(folders):
    metrics = evaluate_backbone(
        ColorNet(), config(folders, fewshot=dataclasses.replace(QUICK, lr=1e-6), trials=1)
    ).metrics
    assert any("did not converge for K = 1, 2 (training loss up to 1.1" in s for s in metrics["statements"])


def test_a_single_trial_has_no_spread_and_shots_can_be_disabled(folders):
    without = config(folders, trials=1, fewshot=FewShotConfig(shots=[]), gallery=0, map=MapConfig(points=0))
    metrics = evaluate_backbone(ColorNet(), without).metrics
    assert metrics["clustering"]["std"] is None and "fewshot" not in metrics


def test_the_cache_does_not_change_results(folders, full, tmp_path):
    changed = config(folders, source=folders["source"], cache=str(tmp_path / "cache"))
    for _ in range(2):
        metrics = evaluate_backbone(ColorNet(), changed, before=ColorNet(1)).metrics
        assert metrics["retrieval"] == full.metrics["retrieval"]
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_features_with_nan_are_refused(folders):
    backbone = ColorNet()
    with torch.no_grad():
        backbone.conv.weight[0] = float("nan")
    with pytest.raises(ValueError, match="has NaN or infinity in"):
        evaluate_backbone(backbone, config(folders))


def test_bad_files_are_named_or_left_out(folders, tmp_path):
    train, test = (shutil.copytree(folders[name], tmp_path / name) for name in ("train", "test"))
    (Path(train) / "red" / "3.png").write_bytes(b"no image")
    here = {"train": str(train), "test": str(test)}
    with pytest.raises(ValueError, match=r"3\.png"):
        evaluate_backbone(ColorNet(), config(here))
    with pytest.warns(UserWarning, match="1 bad files were left out"):
        metrics = evaluate_backbone(ColorNet(), config(here, on_bad_file="skip")).metrics
    assert metrics["counts"] == {"train": 23, "test": 15}
    assert list(metrics["bad_files"]) == [str(Path(train) / "red" / "3.png")]
    assert metrics["retrieval"] > 0.9


def test_the_input_size_comes_from_the_run_or_the_network(folders, tmp_path):
    quick = {"size": None, "fewshot": FewShotConfig(shots=[]), "gallery": 0, "map": MapConfig(points=0), "trials": 1}
    run = RunFolder(tmp_path)
    run.write_config({"augment": {"size": 24}}, {})
    metrics = evaluate_backbone(ColorNet(), config(folders, checkpoint=str(tmp_path), resize=32, **quick)).metrics
    assert metrics["config"]["size"] == 24
    backbone = ColorNet()
    backbone.input_size = 20
    assert evaluate_backbone(backbone, config(folders, resize=32, **quick)).metrics["config"]["size"] == 20
