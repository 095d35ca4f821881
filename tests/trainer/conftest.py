"""Small images and a small run for the trainer's tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fastuft.config import (
    AugmentConfig,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
    VerdictConfig,
    WatchConfig,
)

SECTIONS = {
    "model": ModelConfig(arch="resnet_tiny", stem="small", head_dim=16, bn_group=8),
    "method": MethodConfig(queue_size=64, key_momentum=0.9),
    "augment": AugmentConfig(size=32, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0),
    "data": DataConfig(batch_size=16, threads=1, replay_fraction=0.5, loader="torch"),
    "optim": OptimConfig(lr=0.05, epochs=2),
    "runtime": RuntimeConfig(device="cpu", tensorboard=False, log_every=1),
    "watch": WatchConfig(),
    "verdict": VerdictConfig(),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in the same order on any machine, and no contention for cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """(target, source): 40 and 48 PNG images of 3 classes."""
    from PIL import Image  # a bare machine of the GPU suite lacks it

    root = tmp_path_factory.mktemp("images")
    for name, count in (("target", 40), ("source", 48)):
        for index in range(count):
            generator = np.random.default_rng([index, count])
            coarse = generator.integers(0, 256, (4, 4, 3)).astype(np.uint8)
            path = root / name / f"class{index % 3}" / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC).save(path)
    return str(root / "target"), str(root / "source")


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A backbone with random weights to start from."""
    from fastuft.model import build_backbone, export_backbone

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("start") / "start.safetensors"
    export_backbone(build_backbone("resnet_tiny", "small"), file)
    return str(file)


@pytest.fixture
def tiny(folders, tmp_path):
    """``tiny(optim={"lr": 0.1}, seed=3)``: a run of a few seconds with these changes, two epochs of four steps."""

    def make(**changes: Any) -> TrainConfig:
        parts = {n: dataclasses.replace(s, **changes.pop(n, {})) for n, s in SECTIONS.items()}
        options = {"target": folders[0], "source": folders[1], "out": str(tmp_path / "run"), "seed": 1, **changes}
        return TrainConfig(**options, **parts)

    return make
