"""The whole workflow through the real command line: a checkpoint in MoCo's layout, finetuning, evaluation, export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fastuft.model import build_backbone

pytestmark = pytest.mark.e2e

SIDE = 32


def fastuft(*arguments, status=0):
    """Run the command line in a separate process; returns its standard output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastuft.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def write_classes(folder, classes, count, generator):
    """Nested class folders in several formats; direction and color of stripes depend on the class."""
    y, x = np.mgrid[:SIDE, :SIDE]
    for label in range(classes):
        class_folder = folder / f"class {label}"
        class_folder.mkdir(parents=True)
        for index in range(count):
            phase = generator.uniform(0, 2 * np.pi)
            angle = np.pi * label / classes + generator.normal(0, 0.05)
            wave = np.sin(0.7 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
            color = np.array([1.0, 0.3 + 0.2 * label, 1.0 - 0.3 * label])
            pixels = 128 + 90 * wave[..., None] * color + generator.normal(0, 10, (SIDE, SIDE, 3))
            suffix = ("png", "jpg", "webp", "bmp")[index % 4]
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(class_folder / f"{index}.{suffix}")


def write_moco_checkpoint(path):
    """A ResNet-18 with a two-layer head under the names of MoCo v2's training script."""
    torch.manual_seed(0)
    encoder = {f"encoder_q.{name}": value for name, value in build_backbone("resnet18").state_dict().items()}
    encoder |= {"encoder_q.fc.0.weight": torch.randn(512, 512) * 0.05, "encoder_q.fc.0.bias": torch.zeros(512)}
    encoder |= {"encoder_q.fc.2.weight": torch.randn(128, 512) * 0.05, "encoder_q.fc.2.bias": torch.zeros(128)}
    state = {f"module.{name}": value for name, value in encoder.items()}
    state |= {f"module.{name.replace('encoder_q', 'encoder_k')}": value.clone() for name, value in encoder.items()}
    state |= {"module.queue": torch.randn(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}, path)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The folders, the checkpoint, and a finished finetuning run."""
    root = tmp_path_factory.mktemp("job")
    generator = np.random.default_rng(0)
    for name, classes, count in (("target", 2, 12), ("test", 2, 6), ("source", 3, 40)):
        write_classes(root / name, classes, count, generator)
    write_moco_checkpoint(root / "moco.pth.tar")
    common = ["--target", root / "target", "--source", root / "source", "--model.arch", "resnet18"]
    common += ["--model.bn-group", "4", "--augment.size", SIDE, "--data.batch-size", "8"]
    common += [
        "--method.queue-size",
        "32",
        "--optim.epochs",
        "2",
        "--runtime.device",
        "cpu",
        "--runtime.log-every",
        "1",
    ]
    output = fastuft("finetune", "--init", root / "moco.pth.tar", *common, "--out", root / "run")
    return SimpleNamespace(root=root, run=root / "run", common=common, output=output)


def test_the_run_folder_describes_the_run(job):
    config = yaml.safe_load((job.run / "config.yaml").read_text())
    assert config["method"]["mix"] == "cutmix" and config["model"]["bn_group"] == 4
    summary = json.loads((job.run / "summary.json").read_text())
    assert summary["finished"] and summary["steps"] == 2 * ((24 + 24) // 8)
    rows = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    assert len(train) == summary["steps"] and all(np.isfinite(row["loss"]) for row in train)
    assert {"loss_q", "loss_m", "loss_alignment", "loss_distribution", "lr"} <= set(train[0])
    assert (job.run / "backbone.safetensors").exists() and list((job.run / "checkpoints").glob("*.pt"))


def test_the_run_refuses_a_second_start_and_resumes(job):
    error = fastuft("finetune", "--config", job.run / "config.yaml", status=2)
    assert "already has a run" in error and "Traceback" not in error
    assert "12 steps" in fastuft("finetune", "--config", job.run / "config.yaml", "--resume", "auto")


def test_evaluation_with_and_without_labels(job):
    folders = ["--train", job.root / "target", "--source", job.root / "source", "--before", job.root / "moco.pth.tar"]
    small = ["--size", SIDE, "--fewshot.shots", "1", "--trials", "1", "--fewshot.epochs", "1", "--map.points", "12"]
    labeled = job.root / "labeled"
    output = fastuft("eval", "--checkpoint", job.run, *folders, "--test", job.root / "test", *small, "--out", labeled)
    assert "retrieval" in output and "report.html" in output
    figures = json.loads((labeled / "eval.json").read_text())
    assert 0 <= figures["retrieval"] <= 1
    page = (labeled / "report.html").read_text()
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "")

    flat = job.root / "flat"
    flat.mkdir()
    for index, path in enumerate(sorted((job.root / "target").rglob("*.*"))):
        os.link(path, flat / f"{index}{path.suffix}")
    output = fastuft(
        "eval",
        "--checkpoint",
        job.run,
        "--train",
        flat,
        "--before",
        job.root / "moco.pth.tar",
        "--size",
        SIDE,
        "--map.points",
        "0",
        "--out",
        job.root / "unlabeled",
    )
    assert "few-shot accuracy are not known" in output and "forgetting of the source is not known" in output
    assert "neighbors kept %" in output and "uniformity" in output and "target CKA" in output
    figures = json.loads((job.root / "unlabeled" / "eval.json").read_text())
    assert "retrieval" not in figures and {"before", "target_drift", "neighbor_overlap"} <= set(figures["label_free"])
    page = (job.root / "unlabeled" / "report.html").read_text()
    assert (
        "few-shot accuracy are not known" in page and ">before<" in page and ">after<" in page
    )  # neighbors side by side


def test_export_and_evaluation_of_the_exported_file(job):
    for layout in ("torchvision", "timm"):
        file = job.root / f"{layout}.pth"
        fastuft("export", "--checkpoint", job.run, "--layout", layout, "--out", file)
        state = torch.load(file, weights_only=True)
        assert "layer4.1.conv2.weight" in state and not any(name.startswith("module.") for name in state)
    out = job.root / "again"
    fastuft(
        "eval",
        "--checkpoint",
        job.root / "torchvision.pth",
        "--arch",
        "resnet18",
        "--train",
        job.root / "target",
        "--test",
        job.root / "test",
        "--size",
        SIDE,
        "--fewshot.shots",
        "[]",
        "--out",
        out,
    )
    assert (out / "eval.json").exists()


@pytest.mark.parametrize("broken", ["empty", "missing", "checkpoint"])
def test_wrong_inputs_give_a_one_line_error(job, broken, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint")
    inputs = {
        "empty": ["--target", tmp_path / "empty"],
        "missing": ["--target", tmp_path / "missing"],
        "checkpoint": ["--init", tmp_path / "noise.pth"],
    }
    arguments = ["--init", job.root / "moco.pth.tar", *job.common, *inputs[broken], "--out", tmp_path / "run"]
    error = fastuft("finetune", *arguments, status=2)
    assert error.startswith("fastuft finetune: error: ") and "Traceback" not in error
    assert broken in error or "noise.pth" in error
