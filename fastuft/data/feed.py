"""From files to batches of views: reads files ahead of the decoder and handles bad ones."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastuft.data.backend import Backend, DecodeError, Request, ViewSpec
from fastuft.data.bad import BadFile, BadImageError
from fastuft.data.decoding import EncodedImage, check_whole, decode_rgb, read_image, reason_of, recoded
from fastuft.data.depth import ReadDepth
from fastuft.data.encoded import plain
from fastuft.data.loading import resolve_loader
from fastuft.data.order import Positions
from fastuft.data.reading import MOST_READERS, ReaderPool, Reading, readers_for
from fastuft.data.strong import StrongParameters
from fastuft.data.views import ViewParameters
from fastuft.messages import note
from fastuft.names import printable
from fastuft.randomness import keyed_generator

Drawn = tuple[tuple[ViewParameters, ...], StrongParameters | None]

_AHEAD = 2  # batches that are read while one is assembled, at least
_MANY_BAD = 0.5  # share of bad files at which skipping stops making sense


def make_backend(spec: ViewSpec) -> Backend:
    """The backend named by ``spec.loading.loader``."""
    if resolve_loader(spec.loading.loader) == "dali":
        from fastuft.data.dali import DaliBackend

        return DaliBackend(spec)
    from fastuft.data.torch_loader import TorchBackend

    return TorchBackend(spec)


@dataclass(frozen=True)
class Replacing:
    """How bad files that are skipped are replaced with good ones.

    Args:
        seed: seed of the draw.
        pools: ranges of files; a file is replaced with one from its own range, or with any if it is in none.
    """

    seed: int
    pools: tuple[range, ...]


@dataclass(frozen=True)
class Pass:
    """One pass over the files.

    Args:
        epoch: part of the key of all draws.
        order: the files by position.
        positions: returns the positions of a step's batch.
        draw: draws the parameters of views for images with the given sizes [n, 2] (width, height) at given positions.
    """

    epoch: int
    order: Positions
    positions: Callable[[int], Positions]
    draw: Callable[[int, Positions, np.ndarray], Drawn]


class Feed:
    """Batches of views of a list of files.

    A pool of threads reads the files of the next batches. Each file is checked when it is read (see
    :func:`fastuft.data.decoding.read_image`), and the bytes that were checked are the bytes that are decoded, so a region
    always fits its image. Decoders find only the orientation that we read, because other metadata is removed. A file whose
    size has changed is bad. If decoding fails nevertheless, the current images are decoded one by one to find the bad one,
    and batches that were not yet delivered are made again. A file that the loader's decoder refuses but Pillow reads (with
    DALI, some files with unusual metadata) is not bad: it is decoded without its metadata, or by Pillow.

    Args:
        paths: files.
        spec: how to make views.
        replacing: how to replace skipped files; None leaves them out.
    """

    def __init__(self, paths: Sequence[str], spec: ViewSpec, replacing: Replacing | None = None) -> None:
        self.paths = paths
        self._loading, self._batch_size = spec.loading, spec.batch_size
        self._replacing = replacing
        self._known = np.zeros((len(paths), 3), np.int64)  # width, height and bytes of files read before
        self._bad: dict[int, str] = {}
        self._stripped: set[int] = set()  # files whose metadata the decoder cannot parse
        self._recoded: set[int] = set()  # files that Pillow decodes instead
        self._lock = threading.RLock()  # one thread makes requests, the consumer's handles failures
        fixed = spec.loading.readers
        self._depth = ReadDepth(fixed or readers_for(paths), fixed or MOST_READERS)
        self._pool = ReaderPool(self._depth.workers, spec.loading.read_timeout)
        self._backend = make_backend(spec)

    @property
    def bad_files(self) -> list[BadFile]:
        """The bad files found so far, in order."""
        with self._lock:
            return [BadFile(self.paths[index], reason) for index, reason in sorted(self._bad.items())]

    def batches(self, one_pass: Pass, steps: range) -> Iterator[tuple[Request, list[Tensor]]]:
        """(request, views) of each step; steps without any image left are skipped.

        Raises:
            BadImageError: a file is bad and bad files are not skipped.
            ValueError: too many files are bad.
        """
        first = steps.start
        while first < steps.stop:
            try:
                with closing(self._requests(one_pass, range(first, steps.stop))) as requests:
                    for request, views in self._backend.run(requests):
                        yield request, views
                        first = request.step + 1
                return
            except DecodeError as error:
                self._settle(error)

    def _requests(self, one_pass: Pass, steps: range) -> Generator[Request]:
        """The requests of the steps; a thread makes each one while the batches before it are decoded and used."""
        under_way: deque[tuple[int, Positions, Reading[int, EncodedImage]]] = deque()
        following = iter(steps)

        def read_ahead() -> None:
            ahead = max(_AHEAD, self._depth.batches(self._batch_size))
            while len(under_way) <= ahead and (step := next(following, None)) is not None:
                positions = one_pass.positions(step)
                wanted = [index for index in one_pass.order[positions].tolist() if index not in self._bad]
                under_way.append((step, positions, self._pool.read(self._read, wanted)))

        def make() -> Request | None:
            read_ahead()
            if not under_way:
                return None
            step, positions, reading = under_way.popleft()
            read_ahead()
            return self._request(one_pass, step, positions, reading)

        with ThreadPoolExecutor(1, "requests") as maker:
            made = maker.submit(make)
            while (request := made.result()) is not None:
                made = maker.submit(make)
                if request.images:
                    handed = time.monotonic()
                    yield request
                    self._adapt(request, time.monotonic() - handed)

    def _adapt(self, request: Request, seconds: float) -> None:
        """Read as many images at once as a consumer needs that took ``seconds`` for this batch."""
        size = sum(len(image.data) for image in request.images)
        self._depth.add(len(request.images), size, seconds, self._pool.latency)
        self._pool.workers = self._depth.workers

    def _request(self, one_pass: Pass, step: int, positions: Positions, reading: Reading[int, EncodedImage]) -> Request:
        found = reading.results()
        images: list[EncodedImage] = []
        index = one_pass.order[positions].copy()
        kept = np.ones(len(index), bool)
        results = iter(zip(reading.items, found, strict=True))
        following = next(results, None)
        for row, wanted in enumerate(index.tolist()):
            image: EncodedImage | None = None
            if following is not None and following[0] == wanted:
                image = self._accept(wanted, following[1])
                following = next(results, None)
            if image is None and self._replacing is not None:
                index[row], image = self._replacement(wanted, one_pass.epoch, int(positions[row]))
            if image is None:
                kept[row] = False
            else:
                images.append(image)
        positions, index = positions[kept], index[kept]
        sizes = np.array([image.header.size for image in images], np.int32).reshape(-1, 2)
        views, strong = one_pass.draw(one_pass.epoch, positions, sizes) if images else ((), None)
        return Request(step, images, index, views, strong)

    def _accept(self, index: int, found: EncodedImage | Exception) -> EncodedImage | None:
        """The image, or None for a bad file, which is recorded."""
        if isinstance(found, EncodedImage):
            return found
        self._mark(index, reason_of(found))
        return None

    def _replacement(self, index: int, epoch: int, position: int) -> tuple[int, EncodedImage]:
        """A good file to replace a bad one: the first good one in a sequence drawn from (seed, epoch, position), which is
        the same on all ranks and after restarts.
        """
        assert self._replacing is not None
        pool = self._pool_of(index)
        generator = keyed_generator(self._replacing.seed, "replacement", epoch, position)
        while True:
            index = pool[int(generator.integers(len(pool)))]
            if index not in self._bad:
                (found,) = self._pool.read(self._read, [index]).results()
                image = self._accept(index, found)
                if image is not None:
                    return index, image

    def _read(self, index: int) -> EncodedImage:
        """A file's bytes, checked, in a form that the backend's decoder takes."""
        image = read_image(self.paths[index], self._loading.max_megapixels)
        measured = np.array([*image.header.size, len(image.data)], np.int64)
        if self._known[index, 0] and not np.array_equal(self._known[index], measured):
            before, now = ("{} x {} pixels in {} bytes".format(*each) for each in (self._known[index], measured))
            raise BadImageError(image.path, f"has changed since it was first read (was {before}, is {now})")
        if image.header.described or index in self._stripped:
            image = _described_by_us(image)
        if not self._known[index, 0]:
            check_whole(image)
            if image.header.format == "other":
                self._recoded.add(index)
            elif not self._backend.understands(image):
                self._stripped.add(index)
                image = _described_by_us(image)
                if not self._backend.understands(image):
                    self._leave_to_pillow(index)
            self._known[index] = measured
        return recoded(image) if index in self._recoded else image

    def _pool_of(self, index: int) -> range:
        pools = self._replacing.pools if self._replacing is not None else ()
        return next((pool for pool in pools if index in pool), range(len(self.paths)))

    def _mark(self, index: int, reason: str) -> None:
        path = self.paths[index]
        if self._loading.on_bad_file == "error":
            raise BadImageError(path, reason)
        with self._lock:
            self._bad[index] = reason
            pool = self._pool_of(index)
            count = sum(other in pool for other in self._bad)
        if count > _MANY_BAD * len(pool):
            raise ValueError(
                f"{count} of {len(pool)} files are bad, too many to skip (last: {printable(path)}: {reason}); "
                "run `fastuft verify-data` on the folders"
            )

    def _settle(self, error: DecodeError) -> None:
        """Find the files that made a decoder fail; later requests leave them out or have Pillow decode them."""
        under_way: dict[int, EncodedImage] = {}
        for request in error.requests:
            under_way |= dict(zip(request.index.tolist(), request.images, strict=True))
        decodes = self._backend.decodes(list(under_way.values()))
        culprits = [each for each, good in zip(under_way.items(), decodes, strict=True) if not good]
        if not culprits or any(index in self._recoded for index, _ in culprits):
            raise error  # not the fault of a file
        for index, image in culprits:
            try:
                decode_rgb(image)
            except BadImageError as bad:
                self._mark(index, bad.reason)
            else:
                self._leave_to_pillow(index)

    def _leave_to_pillow(self, index: int) -> None:
        if not self._recoded:
            note(f"{printable(self.paths[index])}: DALI cannot decode it, so Pillow decodes it and all files like it")
        self._recoded.add(index)

    def close(self) -> None:
        """Release threads and memory."""
        self._pool.close()
        self._backend.close()


def _described_by_us(image: EncodedImage) -> EncodedImage:
    """The image with no metadata except the orientation that we read."""
    data = plain(image.data, image.header, orientation=image.header.orientation)
    return EncodedImage(image.path, data, image.header)
