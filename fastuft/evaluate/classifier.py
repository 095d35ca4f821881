"""A backbone with a new classifier: its optimizer and its answers, for few-shot and semi-supervised runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastuft.config import FewShotConfig
from fastuft.device import Precision, autocast
from fastuft.evaluate.features import module_device
from fastuft.evaluate.inputs import UndefinedError
from fastuft.model import Backbone
from fastuft.randomness import keyed_generator


class Classifier(nn.Module):
    """A backbone and a new fully connected layer."""

    def __init__(self, backbone: Backbone, classes: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        features = backbone.num_features
        self.fc = nn.Linear(features, classes)
        with torch.no_grad():
            start = keyed_generator(seed, "classifier").normal(0.0, 0.01, (classes, features))
            self.fc.weight.copy_(torch.from_numpy(start))
            self.fc.bias.zero_()

    @classmethod
    def on(cls, backbone: Backbone, classes: int, seed: int) -> Classifier:
        """A classifier in training mode on top of a copy of ``backbone``, on the same device."""
        return cls(copy.deepcopy(backbone), classes, seed).to(module_device(backbone)).train()

    def train(self, mode: bool = True) -> Classifier:
        """Set training mode but leave BatchNorm in eval mode: statistics of a few images would be noise."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes], in float32 even under autocast: in bfloat16, classes would tie."""
        features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.fc(features.float())
        return logits


def sgd(
    model: Classifier, lr: float, backbone_lr: float, steps: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
    """SGD with momentum 0.9 and no weight decay, and its cosine schedule to zero over ``steps``."""
    groups = [
        {"params": list(model.backbone.parameters()), "lr": backbone_lr},
        {"params": list(model.fc.parameters()), "lr": lr},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    return optimizer, schedule


@torch.no_grad()
def predict(
    models: Sequence[nn.Module], stream: Iterable[tuple[Tensor, Tensor | None]], precision: Precision = "auto"
) -> np.ndarray:
    """Labels [models, N] predicted by several models in one pass over a stream of (images, labels)."""
    device = module_device(models[0])
    batches = []
    for images, _ in stream:
        images = images.to(device, non_blocking=True)
        with autocast(device, precision):
            batches.append(torch.stack([model(images).argmax(1) for model in models]))
    return torch.cat(batches, dim=1).cpu().numpy()


def diverged(what: str, loss: float, config: FewShotConfig) -> UndefinedError:
    """The error for a finetuning whose loss is no longer finite."""
    return UndefinedError(
        f"{what} diverged (the last epoch's loss is {loss}) at fewshot.lr={config.lr:g}, "
        f"fewshot.backbone_lr={config.backbone_lr:g}; lower them"
    )
