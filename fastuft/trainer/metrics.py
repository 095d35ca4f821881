"""From the figures of single steps to rows of metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fastuft.data import Batch
from fastuft.runfolder import Checkpoints, Progress
from fastuft.trainer.distributed import Ranks
from fastuft.trainer.finite import check_losses
from fastuft.trainer.recorder import PartTimes
from fastuft.trainer.step import RECORD


class StepMetrics:
    """Figures and times of the steps since the last row; figures stay on the device until a row is made.

    Args:
        ranks: the processes.
        batch_size: images per step over all ranks.
        steps: largest number of steps per row.
    """

    def __init__(self, ranks: Ranks, batch_size: int, steps: int) -> None:
        self.ranks, self.batch_size = ranks, batch_size
        self.parts = PartTimes(ranks.device)
        self._rows = torch.zeros(steps, len(RECORD), device=ranks.device)
        self.restart()

    def restart(self) -> None:
        """Begin the next row."""
        self._filled, self._waited, self._since = 0, 0.0, time.perf_counter()

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time spent waiting is counted."""
        before = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - before
        return batch

    def add(self, figures: Tensor) -> None:
        """Add the figures [len(RECORD)] of one step, without waiting for the device."""
        self._rows[self._filled].copy_(figures)
        self._filled += 1

    @property
    def full(self) -> bool:
        """Whether a row is due."""
        return self._filled == len(self._rows)

    def row(self, progress: Progress, lr: float, checkpoints: Checkpoints) -> dict[str, object]:
        """The mean over the steps since the last row and over ranks; the host waits for the device only here.

        Raises:
            NonFiniteLossError: a loss is not finite; the message names the last good checkpoint.
        """
        parts = self.parts.read()  # waits for the device, whose time the next line includes
        steps, seconds = self._filled, time.perf_counter() - self._since
        by_rank = torch.stack(self.ranks.gather_objects(self._rows[:steps].cpu()))  # [ranks, steps, figures]
        check_losses(by_rank[:, :, 0], progress.global_step, checkpoints)
        return {
            "kind": "train",
            "step": progress.global_step,
            "epoch": progress.epoch,
            "time": time.time(),
            **dict(zip(RECORD, by_rank.double().mean((0, 1)).tolist(), strict=True)),
            "lr": lr,
            "images_per_second": steps * self.batch_size / seconds,
            "seconds_per_step": seconds / steps,
            "data_wait_share": self._waited / seconds,
            "seconds": {"data": self._waited / steps, **{name: value / steps for name, value in parts.items()}},
        }
