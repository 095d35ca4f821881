"""Exported programs, folders and model cards, without the libraries that read them."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastuft.model import build_backbone, export, export_backbone
from fastuft.model.checkpoint import programs
from fastuft.model.checkpoint.card import model_card
from fastuft.runfolder import RunFolder


@pytest.fixture
def run(tmp_path):
    """A run folder as training writes it, with an evaluation."""
    torch.manual_seed(0)
    folder = RunFolder(tmp_path / "run")
    backbone = build_backbone("resnet_tiny", "small").eval()
    export_backbone(backbone, folder.backbone_file)
    folder.config_file.write_text(
        yaml.safe_dump({"method": {"mix": "cutmix"}, "optim": {"lr": 0.015}, "init": "moco.pth"})
    )
    manifest = {"num_target": 3680, "num_source": 128_117, "content_hash": "abc"}
    summary = {"steps": 20, "total_steps": 20, "images": 5120, "bad_files": 1, "manifest": manifest}
    summary |= {
        "init": {"path": "/weights/moco.pth"},
        "verdict": {"outcome": "better", "reasons": ["rank rose by 12 %"]},
    }
    folder.summary_file.write_text(json.dumps(summary))
    (folder.path / "eval").mkdir()
    evaluation = {"retrieval": 0.637, "clustering": {"mean": 0.473, "std": 0.01, "trials": []}}
    evaluation |= {"fewshot": {"8": {"mean_class": {"mean": 0.7292, "std": 0.002}}}, "statements": ["labels | judged"]}
    evaluation |= {"class_means": {"2": {"mean": 0.5123, "std": 0.03}}}
    (folder.path / "eval" / "eval.json").write_text(json.dumps(evaluation))
    return folder


@torch.no_grad()
def test_a_torch_export_takes_any_batch_size_and_records_its_preprocessing(run, tmp_path):
    export(run.path, tmp_path / "x.pt2", layout="torch_export")
    program = torch.export.load(tmp_path / "x.pt2").module()
    backbone = build_backbone("resnet_tiny", "small").eval()
    backbone.load_state_dict(load_file(run.backbone_file))
    for batch in (1, 4):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(program(images), backbone(images), rtol=1e-4, atol=1e-5)
    beside = json.loads((tmp_path / "x.json").read_text())
    assert beside["input"]["shape"] == ["batch", 3, 32, 32] and beside["mean"] == list(backbone.mean)
    assert beside["output"]["shape"] == ["batch", 64]


def test_a_program_with_wrong_features_is_deleted(run, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "_TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="the features differ from the backbone's"):
        export(run.path, tmp_path / "x.pt2", layout="torch_export")
    assert not (tmp_path / "x.pt2").exists() and not (tmp_path / "x.json").exists()


def test_missing_onnx_libraries_are_named(run, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"layout='onnx' needs onnxruntime.*fastuft\[onnx\]"):
        export(run.path, tmp_path / "x.onnx", layout="onnx")


def test_a_model_card_has_data_recipe_verdict_and_figures(run, tmp_path):
    export(run.path, tmp_path / "x.safetensors")
    card = (tmp_path / "x.md").read_text()
    for text in (
        "| target images, unlabeled | 3680 |",
        "| replayed source images | 128117 |",
        "| started from | /weights/moco.pth |",
        "Without labels: **better**",
        "- rank rose by 12 %",
        "| retrieval accuracy | 63.7 % |",
        "| clustering accuracy | 47.3 % ± 1.0 |",
        "| few-shot mean class accuracy, 8 images per class | 72.9 % ± 0.2 |",
        "| mean class accuracy of class means, 2 images per class | 51.2 % ± 3.0 |",
        "- labels \\| judged",
        "| method.mix | cutmix |",
        "load_backbone('x.safetensors')",
        "crop the center 32 pixels",
    ):
        assert text in card, text


def test_a_card_says_what_the_run_did_not_record(run):
    run.summary_file.write_text("{")
    run.config_file.unlink()
    (run.path / "eval" / "eval.json").unlink()
    with pytest.warns(UserWarning, match=r"leaves out a file that cannot be read.*summary\.json"):
        card = model_card(build_backbone("resnet18"), run, "torchvision", "x.pth")
    assert card.count("Not recorded.") == 2 and "has no labeled evaluation" in card and "## Verdict" not in card
    assert "network = torchvision.models.resnet18()" in card


def test_exports_of_plain_checkpoints_have_no_card(run, tmp_path):
    export(run.backbone_file, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.md").exists()


def test_an_exported_transformers_folder_loads_again(tmp_path):
    backbone = build_backbone("resnet18").eval()
    export_backbone(backbone, tmp_path / "b.safetensors")
    export(tmp_path / "b.safetensors", tmp_path / "hf", layout="transformers")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["depths"] == [2, 2, 2, 2] and config["hidden_sizes"] == [64, 128, 256, 512]
    export(tmp_path / "hf", tmp_path / "again.safetensors")
    assert all(torch.equal(v, backbone.state_dict()[k]) for k, v in load_file(tmp_path / "again.safetensors").items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "transformers", "out": "b.safetensors"}, "is a file, but layout transformers writes a folder"),
        ({"layout": "transformers", "out": "hf"}, "has no ResNet with stem 'small'"),
        ({"layout": "onnx", "out": "x.pth"}, r"wrong suffix for layout onnx; use \.onnx"),
        ({"layout": "torch_export", "out": "x.pt2", "num_classes": 3}, "num_classes=3 is not available"),
    ],
)
def test_impossible_exports_are_refused(tmp_path, arguments, message):
    export_backbone(build_backbone("resnet_tiny", "small"), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "b.safetensors", tmp_path / arguments.pop("out"), **arguments)


def test_resnet_v2_cannot_be_exported_to_transformers(tmp_path):
    export_backbone(build_backbone("bit_resnet_tiny", "small"), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="has no network like bit_resnet_tiny"):
        export(tmp_path / "b.safetensors", tmp_path / "hf", layout="transformers")
