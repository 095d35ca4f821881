"""Lightning: MoCo with mixed queries as a LightningModule, with AMP, checkpoints and exact resume.

The queue is a module, so that Lightning moves it to the device and saves it in every checkpoint: a run that resumes keeps
its negatives. Loss and gradient come from one sweep over it; no logits are stored. ``pip install lightning``.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastuft import InfoNCELoss, KeyQueue, MixedInfoNCELoss, cutmix, sample_boxes


class Contrastive(lightning.LightningModule):
    """MoCo (He et al. 2020) with CutMix queries that have two positives each.

    Args:
        encoder: images [B, C, H, W] to embeddings [B, dim].
        dim: width of an embedding.
        queue_size: keys that serve as negatives.
        momentum: share of itself that the key encoder keeps at each step.
        lr: learning rate.
    """

    def __init__(
        self, encoder: nn.Module, dim: int, queue_size: int = 1024, momentum: float = 0.99, lr: float = 0.05
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.queue = KeyQueue(queue_size, dim)
        self.clean_loss, self.mixed_loss = InfoNCELoss(temperature=0.2), MixedInfoNCELoss(temperature=0.2)
        self.momentum, self.lr = momentum, lr

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        view_q, view_k = batch
        with torch.no_grad():
            for p_q, p_k in zip(self.encoder.parameters(), self.key_encoder.parameters(), strict=True):
                p_k.lerp_(p_q, 1 - self.momentum)
            keys = self.key_encoder(view_k)
        generator = torch.Generator().manual_seed(self.global_step)
        partner = torch.randperm(len(view_q), generator=generator)
        boxes, lam = sample_boxes(len(view_q), *view_q.shape[-2:], generator=generator)
        mixed = cutmix(view_q, boxes.to(view_q.device), partner.to(view_q.device))
        loss = self.clean_loss(self.encoder(view_q), keys, self.queue.keys)
        loss = loss + self.mixed_loss(self.encoder(mixed), keys, keys[partner], lam.to(keys.device), self.queue.keys)
        # After the losses, so that no query meets its own key as a negative; the same on every rank.
        self.queue.enqueue_(self.all_gather(keys).flatten(0, -2))
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.encoder.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)


def small_encoder(dim: int = 32) -> nn.Module:
    """A network that trains in seconds; GroupNorm instead of BatchNorm, whose statistics would reveal the pairs."""
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(256, dim))


def views(count: int = 96) -> TensorDataset:
    """Two noisy views of random images."""
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, *images.shape, generator=torch.Generator().manual_seed(1))
    return TensorDataset(images + 0.3 * noise[0], images + 0.3 * noise[1])


def fit(folder: Path, epochs: int, resume: Path | None = None, precision: str = "bf16-mixed") -> Contrastive:
    """Train up to this number of epochs, and write a checkpoint to ``folder/last.ckpt``."""
    torch.manual_seed(0)
    module = Contrastive(small_encoder(), 32)
    keep = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        callbacks=[keep],
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )
    trainer.fit(module, DataLoader(views(), batch_size=32), ckpt_path=resume)
    print(f"{trainer.global_step} steps, loss {trainer.callback_metrics['loss']:.4f}")
    return module


def main(folder: Path = Path("runs/lightning")) -> None:
    fit(folder, epochs=1)
    fit(folder, epochs=2, resume=folder / "last.ckpt")


if __name__ == "__main__":
    main()
