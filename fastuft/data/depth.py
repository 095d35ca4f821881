"""The number of concurrent reads: Little's law, with the latency of a read and the rate at which images are used."""

from __future__ import annotations

import math
from collections import deque

_WINDOW = 8  # batches over which the rate is averaged
_MARGIN = 1.5  # latencies vary, and a late image delays its batch
_HELD = 1 << 30  # limit of encoded images read ahead, bytes
_AHEAD = 2  # images read ahead per thread, so that no thread waits for the next batch


class ReadDepth:
    """The number of reader threads of a stream, which grows with what the stream needs and never shrinks.

    By Little's law, a source with a latency of L seconds delivers R images per second if L x R reads are in flight. R is the
    rate at which the consumer takes images without waiting. Its waiting time is excluded, because it would hide that more
    reads are needed.

    Args:
        fewest: number of threads at the start.
        most: largest number of threads; if it equals ``fewest``, the number is fixed.
    """

    def __init__(self, fewest: int, most: int) -> None:
        self.workers = fewest
        self._fewest, self._most = fewest, most
        self._batches: deque[tuple[int, int, float]] = deque(maxlen=_WINDOW)

    def add(self, images: int, size: int, seconds: float, latency: float) -> None:
        """Record a batch that was consumed.

        Args:
            images: number of images in the batch.
            size: their encoded bytes.
            seconds: time that the consumer took for them, without waiting.
            latency: mean seconds that reading one image takes.
        """
        self._batches.append((images, size, seconds))
        if len(self._batches) < _WINDOW:
            return
        images, size, seconds = (sum(part) for part in zip(*self._batches, strict=True))
        if images and seconds > 0:
            wanted = math.ceil(_MARGIN * latency * images / seconds)
            fitting = int(_HELD * images / max(1, _AHEAD * size))
            self.workers = max(self.workers, min(wanted, self._most, max(self._fewest, fitting)))

    def batches(self, batch_size: int) -> int:
        """Number of batches of this size to read ahead, so that every thread keeps reading."""
        return -(-_AHEAD * self.workers // batch_size)
