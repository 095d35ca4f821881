"""The evaluation stream: the center crop of each image, once and in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from fastuft.config import AugmentConfig
from fastuft.data.feed import Drawn
from fastuft.data.loading import Loading
from fastuft.data.order import Positions
from fastuft.data.stream import ImageStream, labels_of
from fastuft.data.views import center_views
from fastuft.memory import refuse_beyond, total_memory


class EvalStream(ImageStream):
    """Images in order: shorter side resized to ``resize``, center crop of ``size``, normalized. The last partial batch is kept.

    If bad files are skipped, they are left out, and batches have fewer images.

    Args:
        paths: files.
        labels: their labels, or None.
        loading: how to load images.
        size: side of the crop, pixels.
        resize: shorter side before the crop; 0 means size * 256 / 224.
        batch_size: images per batch.

    Raises:
        ValueError: no images, a ``resize`` below ``size``, labels of another length than paths, or a batch that no machine
            of this size can hold.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | None = None,
        *,
        loading: Loading,
        size: int,
        resize: int = 0,
        batch_size: int = 256,
    ) -> None:
        self.resize = resize or round(size * 256 / 224)
        if self.resize < size:
            raise ValueError(f"resize={resize} is smaller than size={size}; choose at least {size}, or 0")
        images = min(batch_size, len(paths))
        refuse_beyond(
            total_memory(loading.device),
            images * 3 * 4 * size * size + 3 * self.resize * self.resize,
            f"size={size} and resize={self.resize} with {images} images per batch",
            "choose a smaller size or batch_size",
        )
        plain = AugmentConfig(size=size, jitter_p=0, grayscale_p=0, blur_p=0, flip_p=0)
        super().__init__(paths, plain, loading, batch_size=batch_size)
        self.labels = None if labels is None else labels_of(paths, labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(images [b, 3, size, size], labels int64 [b] or None).

        Raises:
            BadImageError: a file is bad and bad files are not skipped; the message names it and the remedy.
        """
        for _, index, (images,) in self._pass(0, np.arange(len(self.paths)), range(len(self))):
            yield images, None if self.labels is None else self.labels[index]

    def _draw(self, epoch: int, positions: Positions, sizes: np.ndarray) -> Drawn:
        return (center_views(sizes, self.augment.size, self.resize),), None
