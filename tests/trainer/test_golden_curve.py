"""A short run through the command line reproduces the losses in tests/golden; refactoring must not change them.

``pytest tests/trainer/test_golden_curve.py --regenerate-golden`` writes them again, after a change that is meant to alter
them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastuft.cli import main

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "finetune.json"
# Columns of the golden file, by their names in metrics.jsonl.
FIGURES = {
    "loss": "loss",
    "loss_q": "loss_q",
    "loss_m": "loss_m",
    "alignment": "loss_alignment",
    "distribution": "loss_distribution",
    "lr": "lr",
}

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:method.queue_size")]

# Settings under which a rounding error stays one: from AVX-512 down to SSE4.1 in oneDNN, MKL or ATen no loss moves by more than
# 3e-7. Longer runs, higher rates or statistics groups of 8 of these images amplify it a hundredfold and more.
SETTINGS = {
    "seed": 5,
    "model.arch": "resnet_tiny",
    "model.stem": "small",
    "model.head_dim": 32,
    "model.bn_group": 16,
    "method.queue_size": 64,
    "augment.size": 32,
    "data.batch_size": 32,
    "data.threads": 1,
    "data.replay_fraction": 0.5,
    "data.loader": "torch",
    "optim.lr": 0.01,
    "runtime.log_every": 1,
    "runtime.tensorboard": "false",
    "runtime.precision": "fp32",
    "runtime.device": "cpu",
}


def flags(out, **changes):
    settings = {**SETTINGS, "out": out, **changes}
    return [f"--{name}={value}" for name, value in settings.items()]


def test_losses_equal_the_golden_curve(folders, tmp_path, request):
    target, source = folders
    start, out = tmp_path / "start", tmp_path / "run"
    common = {"method.mix": "none", "method.queue_prefill": "false", "optim.epochs": 1}
    assert main(["pretrain", *flags(start, target=source, **common)]) == 0
    more = {"init": start / "backbone.safetensors", "target": target, "source": source, "optim.epochs": 3}
    assert main(["finetune", *flags(out, **more), "--recipe=paper"]) == 0
    curves = {}
    for name, folder in (("pretrain", start), ("finetune", out)):
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in found if row["kind"] == "train"]
        curves[name] = {figure: [row[key] for row in rows] for figure, key in FIGURES.items()}
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
        pytest.skip(f"{GOLDEN.name} was written anew; look at its difference before it is committed")
    golden = json.loads(GOLDEN.read_text())
    assert curves.keys() == golden.keys()
    for name, curve in curves.items():
        for figure, values in curve.items():
            assert values == pytest.approx(golden[name][figure], rel=1e-5, abs=1e-7), (name, figure)
