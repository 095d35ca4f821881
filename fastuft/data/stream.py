"""What all streams of images have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastuft.config import AugmentConfig
from fastuft.data.backend import Request, ViewSpec
from fastuft.data.feed import BadFileRule, Feed
from fastuft.data.files import BadFile
from fastuft.data.loading import Loading
from fastuft.data.order import Positions
from fastuft.data.strong import StrongConfig, StrongParameters
from fastuft.data.views import ViewParameters
from fastuft.randomness import keyed_generator

Drawn = tuple[tuple[ViewParameters, ...], StrongParameters | None]


class ImageStream(ABC):
    """Batches of views of a list of files; a subclass says which rows a batch takes and what its views are.

    Args:
        paths: files.
        augment: which operators the views need, and their size.
        loading: how images are loaded.
        batch_size: images per batch; the last one may hold fewer.
        num_views: views of each image.
        strong: RandAugment and Cutout of the last view.
        largest: (width, height) to reserve memory for in a GPU's decoder.
        rule: what happens to bad files.

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
        rule: BadFileRule | None = None,
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
        self._feed = Feed(paths, spec, rule)

    def __len__(self) -> int:
        """Batches of one pass."""
        return -(-len(self.paths) // self.batch_size)

    @property
    def bad_files(self) -> list[BadFile]:
        """Files skipped so far, with the reason."""
        return self._feed.bad_files

    @abstractmethod
    def _draw(self, epoch: int, positions: Positions, sizes: np.ndarray) -> Drawn:
        """Parameters of the views of images of these sizes at these positions of an epoch."""

    def _positions(self, step: int, count: int) -> Positions:
        """Which of an epoch's ``count`` positions a step takes."""
        return np.arange(step * self.batch_size, min((step + 1) * self.batch_size, count))

    def _pass(self, epoch: int, order: Positions, steps: range) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
        """(step, int64 [b] files, views) of each step of one pass over the files in ``order``."""

        def request(step: int) -> Request:
            positions = self._positions(step, len(order))
            index = self._feed.usable(order[positions], epoch, positions)
            views, strong = self._draw(epoch, positions, self._feed.sizes[index])
            return Request(self._feed.names(index), views, index, strong)

        for step, made, views in self._feed.batches(request, steps):
            yield step, torch.from_numpy(made.index), views

    def close(self) -> None:
        """Give back threads and memory."""
        self._feed.close()


def shuffled(seed: int, epoch: int, count: int) -> Positions:
    """The order of one epoch over ``count`` files."""
    return keyed_generator(seed, "order", epoch).permutation(count)


def labels_of(paths: Sequence[str], labels: Sequence[int]) -> Tensor:
    """Labels int64 [N] of the files.

    Raises:
        ValueError: not one label per file.
    """
    if len(labels) != len(paths):
        raise ValueError(f"labels has {len(labels)} entries for {len(paths)} images; give one label per image")
    return torch.as_tensor(labels, dtype=torch.int64)
