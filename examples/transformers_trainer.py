"""Hugging Face Trainer: MoCo with a network of transformers, with AMP, checkpoints and resume.

The Trainer takes the loss from the model; the queue is a module of the model, so checkpoints include its keys.
``pip install transformers accelerate``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastuft import InfoNCELoss, KeyQueue


class Contrastive(nn.Module):
    """MoCo (He et al. 2020) around a vision transformer.

    Args:
        backbone: a network of transformers that takes ``pixel_values``; its class token is the feature.
        dim: width of an embedding.
        queue_size: keys that serve as negatives.
        momentum: share of itself that the key encoder keeps at each step.
    """

    def __init__(self, backbone: Any, dim: int = 32, queue_size: int = 1024, momentum: float = 0.99) -> None:
        super().__init__()
        width = backbone.config.hidden_size
        self.encoder = nn.ModuleDict(
            {"backbone": backbone, "head": nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))}
        )
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.queue = KeyQueue(queue_size, dim)
        self.criterion, self.momentum = InfoNCELoss(temperature=0.2), momentum

    def embed(self, encoder: nn.ModuleDict, images: Tensor) -> Tensor:
        return encoder["head"](encoder["backbone"](pixel_values=images).last_hidden_state[:, 0])

    def forward(self, view_q: Tensor, view_k: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            if self.training:  # before the keys, as in MoCo
                for p_q, p_k in zip(self.encoder.parameters(), self.key_encoder.parameters(), strict=True):
                    p_k.lerp_(p_q, 1 - self.momentum)
            keys = self.embed(self.key_encoder, view_k)
        loss = self.criterion(self.embed(self.encoder, view_q), keys, self.queue.keys)
        if self.training:
            self.queue.enqueue_(keys)  # after the loss, so that no query meets its own key as a negative
        return {"loss": loss}


class Views(Dataset[dict[str, Tensor]]):
    """Two noisy views of random images."""

    def __init__(self, count: int = 96) -> None:
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(2, *images.shape, generator=torch.Generator().manual_seed(1))
        self.views = images + 0.3 * noise

    def __len__(self) -> int:
        return self.views.shape[1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"view_q": self.views[0, index], "view_k": self.views[1, index]}


def small_backbone() -> Any:
    """A vision transformer that trains in seconds."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **size), add_pooling_layer=False)


def fit(folder: Path, epochs: int, *, resume: bool = False, bf16: bool = True) -> transformers.Trainer:
    """Train up to this number of epochs, with a checkpoint after each."""
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        bf16=bf16,
        use_cpu=True,
        save_strategy="epoch",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,  # the views are arguments of the model
    )
    trainer = transformers.Trainer(Contrastive(small_backbone()), arguments, train_dataset=Views())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main(folder: Path = Path("runs/transformers")) -> None:
    fit(folder, epochs=1)
    fit(folder, epochs=2, resume=True)


if __name__ == "__main__":
    main()
