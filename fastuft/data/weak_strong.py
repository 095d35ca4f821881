"""The stream of consistency training: a weak and a strong view of each unlabeled image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from fastuft.config import AugmentConfig
from fastuft.data.feed import Drawn, Replacing
from fastuft.data.loading import Loading
from fastuft.data.order import Positions
from fastuft.data.stream import ImageStream, shuffled
from fastuft.data.strong import StrongConfig, draw_strong, draws_of
from fastuft.data.views import draw_views, uniforms


class WeakStrongStream(ImageStream):
    """A weak and a strong view of unlabeled images, for consistency training (FixMatch).

    Weak: crop and flip. Strong: another crop and flip, then RandAugment and Cutout. Each file is decoded once for both.
    Order and draws are functions of (seed, epoch, position).

    Args:
        paths: files.
        loading: how to load images.
        augment: crop and flip of both views; it must not change colors or blur.
        strong: RandAugment and Cutout.
        batch_size: images per batch; the last partial batch is kept.
        seed: seed of order and views.

    Raises:
        ValueError: no images, or ``augment`` changes colors or blurs.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        loading: Loading,
        augment: AugmentConfig,
        strong: StrongConfig,
        batch_size: int,
        seed: int,
    ) -> None:
        if augment.jitter_p or augment.grayscale_p or augment.blur_p:
            raise ValueError(
                "augment.jitter_p, grayscale_p and blur_p must be 0 here: RandAugment works on whole gray levels, and "
                "the weak view keeps its colors"
            )
        super().__init__(
            paths, augment, loading, batch_size=batch_size, num_views=2, strong=strong, replacing=Replacing(seed, ())
        )
        self.strong = strong
        self.seed = seed

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(weak, strong) views of one shuffled pass, [b, 3, size, size] each.

        Raises:
            BadImageError: a file is bad and bad files are not skipped; the message names it and the remedy.
        """
        order = shuffled(self.seed, epoch, len(self.paths))
        for _, _, (weak, strong) in self._pass(epoch, order, range(len(self))):
            yield weak, strong

    def _draw(self, epoch: int, positions: Positions, sizes: np.ndarray) -> Drawn:
        views = tuple(draw_views(self.augment, sizes, uniforms(self.seed, epoch, view, positions)) for view in range(2))
        u = uniforms(self.seed, epoch, "strong", positions, draws_of(self.strong))
        return views, draw_strong(self.strong, self.augment.size, u)
