"""The common base of all image streams."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastuft.config import AugmentConfig
from fastuft.data.backend import ViewSpec
from fastuft.data.bad import BadFile
from fastuft.data.feed import Drawn, Feed, Pass, Replacing
from fastuft.data.loading import Loading
from fastuft.data.order import Positions
from fastuft.data.strong import StrongConfig
from fastuft.randomness import keyed_generator


class ImageStream(ABC):
    """Batches of views of a list of files; a subclass decides which rows a batch has and what its views are.

    Args:
        paths: files.
        augment: the operators that the views need, and their size.
        loading: how to load images.
        batch_size: images per batch; the last batch may have fewer.
        num_views: views of each image.
        strong: RandAugment and Cutout of the last view.
        largest: (width, height) to reserve memory for in a GPU's decoder.
        replacing: how to replace skipped files; None leaves them out.

    Raises:
        ValueError: no files.
    """

    def __init__(
        self,
        paths: Sequence[str],
        augment: AugmentConfig,
        loading: Loading,
        *,
        batch_size: int,
        num_views: int = 1,
        strong: StrongConfig | None = None,
        largest: tuple[int, int] = (0, 0),
        replacing: Replacing | None = None,
    ) -> None:
        if not paths:
            raise ValueError("paths is empty; give at least one image")
        self.paths = paths
        self.augment = augment
        self.batch_size = min(batch_size, len(paths))
        spec = ViewSpec(
            size=augment.size,
            num_views=num_views,
            color=augment.jitter_p > 0 or augment.grayscale_p > 0,
            blur=augment.blur_p > 0,
            rotation=augment.rotation > 0,
            batch_size=self.batch_size,
            loading=loading,
            largest=largest,
            strong=strong,
        )
        self._feed = Feed(paths, spec, replacing)

    def __len__(self) -> int:
        """Batches of one pass."""
        return -(-len(self.paths) // self.batch_size)

    @property
    def bad_files(self) -> list[BadFile]:
        """Files that this rank has skipped so far, with reasons."""
        return self._feed.bad_files

    @abstractmethod
    def _draw(self, epoch: int, positions: Positions, sizes: np.ndarray) -> Drawn:
        """The parameters of views for images with these sizes at these positions of an epoch."""

    def _positions(self, step: int, count: int) -> Positions:
        """The positions of a step's batch, out of ``count`` positions in an epoch."""
        return np.arange(step * self.batch_size, min((step + 1) * self.batch_size, count))

    def _pass(self, epoch: int, order: Positions, steps: range) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
        """(step, int64 [b] files, views) for each step of one pass over the files in ``order``."""

        one_pass = Pass(epoch, order, lambda step: self._positions(step, len(order)), self._draw)
        for request, views in self._feed.batches(one_pass, steps):
            yield request.step, torch.from_numpy(request.index), views

    def close(self) -> None:
        """Release threads and memory."""
        self._feed.close()


def shuffled(seed: int, epoch: int, count: int) -> Positions:
    """The order of one epoch over ``count`` files."""
    return keyed_generator(seed, "order", epoch).permutation(count)


def labels_of(paths: Sequence[str], labels: Sequence[int]) -> Tensor:
    """The labels of the files, int64 [N].

    Raises:
        ValueError: not one label per file.
    """
    if len(labels) != len(paths):
        raise ValueError(f"labels has {len(labels)} entries for {len(paths)} images; give one label per image")
    return torch.as_tensor(labels, dtype=torch.int64)
