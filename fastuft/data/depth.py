"""How many images are read at once: Little's law, with the latency of a read and the rate at which images are used."""

from __future__ import annotations

import math
from collections import deque

_WINDOW = 8  # batches over which the rate is taken
_MARGIN = 1.5  # latencies scatter, and a late image holds up its batch
_HELD = 1 << 30  # bytes of encoded images that reading ahead may hold
_AHEAD = 2  # images read ahead per thread, so that no thread waits for the next batch


class ReadDepth:
    """The number of reader threads of a stream, which grows with what the stream needs and never shrinks.

    By Little's law, a source that answers after L seconds keeps up with R images per second if L x R reads are under way.
    R is the rate at which the consumer takes images when it does not wait for them. The time that it waits is left out, since
    too few reads would slow it down and thereby hide that more are needed.

    Args:
        fewest: threads at the start.
        most: threads at most; the same number fixes it.
    """

    def __init__(self, fewest: int, most: int) -> None:
        self.workers = fewest
        self._fewest, self._most = fewest, most
        self._batches: deque[tuple[int, int, float]] = deque(maxlen=_WINDOW)

    def add(self, images: int, size: int, seconds: float, latency: float) -> None:
        """Count a batch that was used.

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
        """Batches of that many images that keep every thread reading."""
        return -(-_AHEAD * self.workers // batch_size)
