"""The order of images in an epoch, a pure function of (seed, epoch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastuft.randomness import keyed_generator

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class EpochPlan:
    """How target and replayed source images fill the batches of an epoch.

    union: one shuffled pass over both. balanced: one shuffled pass over the target, with ``source_rows`` source images in
    every batch from consecutive shuffled passes over the source; rows are shuffled within a batch, so that mixing does not
    always pair a target image with a source image. With ``drop_last``, the last partial batch is dropped, which is a
    different remainder in each epoch.

    Args:
        num_target: number of target images, which are rows [0, num_target) of the manifest.
        num_source: number of replayed source images, which are the rows after them.
        batch: global batch.
        mode: union or balanced.
        share: source share of each batch, if balanced.
        drop_last: drop the last partial batch.

    Raises:
        ValueError: balanced without source images, or fewer images than a batch needs.
    """

    num_target: int
    num_source: int
    batch: int
    mode: Literal["union", "balanced"] = "union"
    share: float = 0.5
    drop_last: bool = True

    def __post_init__(self) -> None:
        if self.mode == "balanced" and self.num_source == 0:
            raise ValueError(
                "data.replay_mode='balanced' needs source images, but there are none; name a source folder, or set "
                "data.replay_mode to union"
            )
        if self.steps == 0:
            raise ValueError(
                f"data.batch_size={self.batch} needs {self._pass_rows} images for one step, but there are only "
                f"{self._pass_images}; choose a smaller batch size, or set data.drop_last to false"
            )

    @property
    def source_rows(self) -> int:
        """Source images in each batch of balanced replay; a batch has at least one image of each kind."""
        return min(max(round(self.share * self.batch), 1), self.batch - 1)

    @property
    def _pass_images(self) -> int:
        return self.num_target + (self.num_source if self.mode == "union" else 0)

    @property
    def _pass_rows(self) -> int:
        return self.batch - (self.source_rows if self.mode == "balanced" else 0)

    @property
    def steps(self) -> int:
        """Batches of one epoch."""
        whole, rest = divmod(self._pass_images, self._pass_rows)
        return whole + (rest > 0 and not self.drop_last)

    def order(self, seed: int, epoch: int) -> Positions:
        """Rows of the manifest in the order of one epoch, int64 [images]."""
        targets = keyed_generator(seed, "order", epoch).permutation(self._pass_images)
        if self.mode == "union":
            return targets[: self.steps * self.batch]
        sources = self.num_target + self._source_rows_of(seed, epoch)
        shuffle = keyed_generator(seed, "rows", epoch)
        batches = []
        for step in range(self.steps):
            rows = np.concatenate(
                [
                    targets[step * self._pass_rows : (step + 1) * self._pass_rows],
                    sources[step * self.source_rows : (step + 1) * self.source_rows],
                ]
            )
            batches.append(rows[shuffle.permutation(len(rows))])
        return np.concatenate(batches)

    def _source_rows_of(self, seed: int, epoch: int) -> Positions:
        """Source images of a balanced epoch, which continue where the epoch before stopped, pass after pass."""
        rows = self.steps * self.source_rows
        first = epoch * rows
        passes = range(first // self.num_source, -(-(first + rows) // self.num_source))
        cycle = np.concatenate([keyed_generator(seed, "source order", p).permutation(self.num_source) for p in passes])
        return cycle[first % self.num_source :][:rows]
