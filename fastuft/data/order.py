"""Which image stands where: the epoch's order is a pure function of (seed, epoch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastuft.randomness import keyed_generator

Positions = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class EpochPlan:
    """How target and replayed source images fill the batches of an epoch.

    union: one shuffled pass over both. balanced: one shuffled pass over the target with ``source_rows`` source images
    in every batch, which come from consecutive shuffled passes over the source; rows are shuffled within a batch, so
    that pairs of rows are not always one of each. With ``drop_last`` the last partial batch is left out: a different
    remainder each epoch.

    Args:
        num_target: target images, manifest positions [0, num_target).
        num_source: replayed source images, the positions after them.
        batch: global batch.
        mode: union or balanced.
        share: source share of each batch, balanced only.
        drop_last: leave out the last partial batch.

    Raises:
        ValueError: balanced without source images, or fewer images than one batch takes.
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
                "data.replay_mode='balanced' needs source images and there are none; name a source folder, or set "
                "data.replay_mode to union"
            )
        if self.steps == 0:
            raise ValueError(
                f"data.batch_size={self.batch} needs {self._pass_rows} images for one step and there are "
                f"{self._pass_images}; choose a smaller batch, or set data.drop_last to false"
            )

    @property
    def source_rows(self) -> int:
        """Source images in each batch of balanced replay; at least one of either kind."""
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
        """Manifest positions of one epoch in the order of training, int64 [images]."""
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
        """Source images of a balanced epoch: they go on where the epoch before stopped, pass after pass."""
        rows = self.steps * self.source_rows
        first = epoch * rows
        passes = range(first // self.num_source, -(-(first + rows) // self.num_source))
        cycle = np.concatenate([keyed_generator(seed, "source order", p).permutation(self.num_source) for p in passes])
        return cycle[first % self.num_source :][:rows]
