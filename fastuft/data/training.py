"""The training stream: two views of each target and replayed source image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastuft.config import AugmentConfig, DataConfig
from fastuft.data.bad import BadImageError
from fastuft.data.decoding import image_size
from fastuft.data.feed import Drawn, Replacing
from fastuft.data.loading import Loading
from fastuft.data.manifest import Manifest
from fastuft.data.order import EpochPlan, Positions
from fastuft.data.stream import ImageStream
from fastuft.data.views import draw_views, uniforms

_PROBED = 256  # images whose sizes are read to reserve memory in a GPU's decoder


@dataclass(frozen=True)
class Batch:
    """One rank's share of a training step.

    Args:
        query: views for the query encoder, [b, 3, H, W] channels_last, normalized.
        key: the other views of the same images.
        index: rows of the manifest, int64 [b] on the CPU.
        is_source: which images are replayed source images, bool [b] on the CPU.
        epoch: epoch, from 0.
        step: step within the epoch, from 0.
    """

    query: Tensor
    key: Tensor
    index: Tensor
    is_source: Tensor
    epoch: int
    step: int


class TrainStream(ImageStream):
    """Two augmented views of target and replayed source images.

    The order, the crops and all other random numbers are functions of (seed, epoch, global position, view), so images and
    views do not depend on the number of ranks, threads or restarts. Rank r takes rows [r b, (r + 1) b) of each global batch.

    Args:
        manifest: the training images.
        data: batch size and replay mode.
        augment: strengths of the views.
        loading: how to load images.
        seed: the run's seed.
        rank: rank of this process.
        world_size: number of processes.

    Raises:
        ValueError: fewer images than a batch needs, or a batch that does not divide over the ranks.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        augment: AugmentConfig,
        *,
        loading: Loading,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if data.batch_size % world_size:
            raise ValueError(
                f"data.batch_size={data.batch_size} does not divide over {world_size} processes; "
                f"choose a multiple of {world_size}"
            )
        if not data.drop_last and world_size > 1:
            raise ValueError("data.drop_last=False works only with one process; set data.drop_last to true")
        self._plan = EpochPlan(
            num_target=manifest.num_target,
            num_source=manifest.num_source,
            batch=data.batch_size,
            mode=data.replay_mode,
            share=data.replay_share,
            drop_last=data.drop_last,
        )
        pools = (range(manifest.num_target), range(manifest.num_target, len(manifest)))
        super().__init__(
            manifest.paths,
            augment,
            loading,
            batch_size=data.batch_size // world_size,
            num_views=2,
            largest=_largest(manifest.paths, loading.max_megapixels) if loading.device.type == "cuda" else (0, 0),
            replacing=Replacing(seed, pools),
        )
        self.manifest = manifest
        self.seed = seed
        self._global_batch = data.batch_size
        self._first_row = rank * (data.batch_size // world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Training steps per epoch."""
        return self._plan.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of one epoch, from ``start_step`` on.

        Raises:
            BadImageError: a file is bad and bad files are not skipped; the message names it and the remedy.
        """
        order = self._plan.order(self.seed, epoch)
        is_source = torch.from_numpy(self.manifest.is_source)
        for step, index, (query, key) in self._pass(epoch, order, range(start_step, self.steps_per_epoch)):
            yield Batch(query, key, index, is_source[index], epoch, step)

    def _positions(self, step: int, count: int) -> Positions:
        first = step * self._global_batch + self._first_row
        return np.arange(first, min(first + self.batch_size, count))

    def _draw(self, epoch: int, positions: Positions, sizes: np.ndarray) -> Drawn:
        draws = (uniforms(self.seed, epoch, view, positions) for view in range(2))
        return tuple(draw_views(self.augment, sizes, u) for u in draws), None

    def prefill(self, count: int) -> Iterator[Tensor]:
        """Key views [b, 3, H, W] of at least ``count`` images over all ranks, for filling the queue before training.

        The order and the views belong to epoch -1, so training uses none of them. If the manifest has too few images, more
        come from further passes (-2, -3, ...). Batches are whole, so the last may exceed ``count``.
        """
        epoch = -1
        while count > 0:
            for batch in self.epoch(epoch):
                yield batch.key
                count -= self._global_batch
                if count <= 0:
                    break
            epoch -= 1


def _largest(paths: Sequence[str], max_megapixels: float) -> tuple[int, int]:
    """The largest width and height among an evenly spread sample of the images; bad files are ignored."""
    sizes = [(0, 0)]
    for path in paths[:: max(1, len(paths) // _PROBED)]:
        try:
            sizes.append(image_size(path, max_megapixels))
        except BadImageError:
            continue
    width, height = (max(side) for side in zip(*sizes, strict=True))
    return width, height
