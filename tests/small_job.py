"""A folder for runs of a few seconds: images, a checkpoint to start from, and option files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from fastuft.model import build_backbone, export_backbone

TINY: dict[str, Any] = {
    "model": {"arch": "resnet_tiny", "stem": "small", "head_dim": 16, "bn_group": 8},
    "method": {"queue_size": 64},
    "augment": {"size": 32, "jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0},
    "data": {"batch_size": 16, "threads": 1, "replay_fraction": 0.5, "loader": "torch"},
    "optim": {"epochs": 1},
    "runtime": {"device": "cpu", "tensorboard": False, "log_every": 1},
}
EVALUATION: dict[str, Any] = {
    "size": 32,
    "resize": 32,
    "trials": 1,
    "loader": "torch",
    "gallery": 0,
    "map": {"points": 0},
}
EVALUATION["fewshot"] = {"shots": [1], "epochs": 1}


def write_small_job(root: Path) -> Path:
    """photos/, test/ and source/ of two classes, start.safetensors, photos.yaml and eval.yaml; returns ``root``."""
    for name, count in (("photos", 24), ("test", 8), ("source", 32)):
        for index in range(count):
            coarse = np.random.default_rng([index, count]).integers(0, 256, (4, 4, 3)).astype(np.uint8)
            path = root / name / f"class{index % 2}" / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC).save(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        export_backbone(build_backbone("resnet_tiny", "small"), root / "start.safetensors")
    (root / "photos.yaml").write_text(yaml.safe_dump(TINY))
    (root / "eval.yaml").write_text(yaml.safe_dump(EVALUATION))
    return root
