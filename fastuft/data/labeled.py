"""The stream of supervised training: random views of labeled images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from fastuft.config import AugmentConfig
from fastuft.data.feed import Drawn, Replacing
from fastuft.data.loading import Loading
from fastuft.data.order import Positions
from fastuft.data.stream import ImageStream, labels_of, shuffled
from fastuft.data.views import draw_views, uniforms


class LabeledTrainStream(ImageStream):
    """Random resized crops and flips of labeled images, for finetuning a classifier.

    Args:
        paths: files.
        labels: their labels.
        loading: how to load images.
        augment: the random views.
        batch_size: images per batch; the last partial batch is kept.
        seed: seed of order and views.

    Raises:
        ValueError: no images, or not one label per path.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        *,
        loading: Loading,
        augment: AugmentConfig,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__(paths, augment, loading, batch_size=batch_size, replacing=Replacing(seed, ()))
        self.labels = labels_of(paths, labels)
        self.seed = seed

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images [b, 3, size, size], labels int64 [b]) of one shuffled pass.

        Raises:
            BadImageError: a file is bad and bad files are not skipped; the message names it and the remedy.
        """
        order = shuffled(self.seed, epoch, len(self.paths))
        for _, index, (images,) in self._pass(epoch, order, range(len(self))):
            yield images, self.labels[index]

    def _draw(self, epoch: int, positions: Positions, sizes: np.ndarray) -> Drawn:
        return (draw_views(self.augment, sizes, uniforms(self.seed, epoch, 0, positions)),), None
