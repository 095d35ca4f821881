"""Supervised training of a backbone on class folders: the pretraining of Tables 3 and 4 if no checkpoint is given."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fastuft.config import AugmentConfig
from fastuft.data import LabeledTrainStream, Loading, labeled_folder
from fastuft.model import Stem, build_backbone, export_backbone
from fastuft.randomness import keyed_seed
from fastuft.runfolder import RunFolder


def train_supervised(
    folder: str,
    out: str | Path,
    *,
    arch: str,
    stem: Stem,
    augment: AugmentConfig,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """Train a backbone and a linear classifier with cross-entropy, and write the backbone into ``out``.

    It uses SGD with momentum 0.9, weight decay 1e-4 and a cosine schedule to zero over all steps.

    Args:
        folder: class folders of images.
        out: run folder; backbone.safetensors is written at the end.
        arch: the network.
        stem: its stem.
        augment: views.
        epochs: passes over the images.
        lr: learning rate.
        batch_size: images per step.
        seed: seed of weights, order and views.
        device: the device to train on.

    Returns:
        The mean loss of the last epoch.
    """
    paths, labels, classes = labeled_folder(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "supervised"))
        backbone = build_backbone(arch, stem)
        model = nn.Sequential(backbone, nn.Linear(backbone.num_features, len(classes)))
    model.train().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    stream = LabeledTrainStream(
        paths,
        labels,
        loading=Loading(backbone.mean, backbone.std, torch.device(device)),
        augment=augment,
        batch_size=batch_size,
        seed=seed,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    steps = epochs * math.ceil(len(paths) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    total = torch.zeros((), device=device)
    for epoch in range(epochs):
        total.zero_()
        for images, target in stream.epoch(epoch):
            loss = F.cross_entropy(model(images), target.to(device, non_blocking=True))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(target)
    stream.close()
    last = float(total) / len(paths)
    if not math.isfinite(last):
        raise ValueError(f"supervised training diverged (loss {last}) at lr={lr:g}; lower it")
    Path(out).mkdir(parents=True, exist_ok=True)
    export_backbone(backbone, RunFolder(Path(out)).backbone_file)
    return last
