"""From files to batches of views: looks at each file before a decoder does, and deals with the bad ones."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from fastuft.data.backend import Backend, DecodeError, Request, ViewSpec
from fastuft.data.files import BadFile, BadImageError, image_size, in_threads, open_rgb
from fastuft.data.loading import resolve_loader
from fastuft.randomness import keyed_generator

_LOOKERS = 16  # threads that look at new files; on network storage each waits
_MANY_BAD = 0.5  # share of bad files at which skipping stops making sense


def make_backend(spec: ViewSpec) -> Backend:
    """The backend that ``spec.loading.loader`` names."""
    if resolve_loader(spec.loading.loader) == "dali":
        from fastuft.data.dali import DaliBackend

        return DaliBackend(spec)
    from fastuft.data.torch_loader import TorchBackend

    return TorchBackend(spec)


@dataclass(frozen=True)
class BadFileRule:
    """What happens to files that cannot be used.

    Args:
        skip: replace them by good ones and count them; otherwise an error names the first.
        seed: of the draw of replacements.
        pools: ranges of positions; a file is replaced by one of its own range.
    """

    skip: bool = False
    seed: int = 0
    pools: tuple[range, ...] = ()


def _made_ahead(request: Callable[[int], Request], steps: range) -> Generator[Request]:
    """``request(step)`` of each step, made by a thread while the batches before it are decoded and used."""
    with ThreadPoolExecutor(1, "requests") as maker:
        following = maker.submit(request, steps.start)
        for step in steps:
            ready = following
            if step + 1 < steps.stop:
                following = maker.submit(request, step + 1)
            yield ready.result()


class Feed:
    """Batches of views of a list of files.

    Every file is looked at once before a decoder sees it (see :func:`fastuft.data.files.image_size`), a batch ahead and
    in parallel. Where decoding fails all the same, the culprit is found by decoding the images under way one by one,
    and the batches that were not handed out yet are made again. A file that the loader's decoder refuses and Pillow
    reads (DALI: some WebP files with metadata) is no bad file: a lossless copy in a temporary folder takes its place,
    with a warning.

    Args:
        paths: files.
        spec: how views are made.
        rule: for bad files.
    """

    def __init__(self, paths: Sequence[str], spec: ViewSpec, rule: BadFileRule | None = None) -> None:
        self.paths = paths
        self.sizes = np.zeros((len(paths), 2), np.int32)  # width, height of upright images; 0: not looked at yet
        self._rule = rule or BadFileRule()
        self._max_megapixels = spec.loading.max_megapixels
        self._bad: dict[int, str] = {}
        self._copies: dict[int, str] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.RLock()  # requests are made by a thread, failures dealt with by the consumer's
        self._backend = make_backend(spec)

    @property
    def bad_files(self) -> list[BadFile]:
        """Files found bad so far, in their order."""
        return [BadFile(self.paths[index], reason) for index, reason in sorted(self._bad.items())]

    def names(self, indices: np.ndarray) -> list[str]:
        """Files to read for positions."""
        return [self._copies.get(index, self.paths[index]) for index in indices.tolist()]

    def usable(self, indices: np.ndarray, epoch: int = 0, positions: np.ndarray | None = None) -> np.ndarray:
        """The indices with bad files replaced by good ones, drawn by (seed, epoch, position): the first good one of a
        fixed sequence, so that all ranks and restarts take the same.

        Raises:
            BadImageError: a bad file, unless the rule is to skip.
            ValueError: most of the files are bad.
        """
        chosen = indices.copy()
        with self._lock:
            self._look(indices.tolist())
            for row, index in enumerate(indices.tolist()):
                if index in self._bad:
                    assert positions is not None, "only streams that know positions skip files"
                    pool = self._pool(index)
                    generator = keyed_generator(self._rule.seed, "replacement", epoch, int(positions[row]))
                    while index in self._bad:
                        index = pool[int(generator.integers(len(pool)))]
                        self._look([index])
                    chosen[row] = index
        return chosen

    def _look(self, indices: list[int]) -> None:
        """Check those files that were not looked at before; their sizes are known afterwards, or they are bad."""
        new = [index for index in dict.fromkeys(indices) if not self.sizes[index, 0] and index not in self._bad]

        def look(index: int) -> tuple[tuple[int, int], bool] | BadImageError:
            path = self.paths[index]
            try:
                return image_size(path, self._max_megapixels), self._backend.parses(path)
            except BadImageError as error:
                return error

        for index, found in zip(new, in_threads(look, new, _LOOKERS, chunk=4) if new else (), strict=True):
            if isinstance(found, BadImageError):
                self._mark(index, found.reason)
                continue
            self.sizes[index], parsed = found
            if not parsed:
                self._copy(index)

    def _pool(self, index: int) -> range:
        return next((pool for pool in self._rule.pools if index in pool), range(len(self.paths)))

    def _mark(self, index: int, reason: str) -> None:
        path = self.paths[index]
        if not self._rule.skip:
            raise BadImageError(path, reason, skippable=bool(self._rule.pools))
        self._bad[index] = reason
        pool = self._pool(index)
        count = sum(other in pool for other in self._bad)
        if count > _MANY_BAD * len(pool):
            raise ValueError(
                f"{count} of {len(pool)} files are bad, too many to skip (last: {path}: {reason}); "
                "run `fastuft verify-data` on the folders"
            )

    def batches(self, request: Callable[[int], Request], steps: range) -> Iterator[tuple[int, Request, list[Tensor]]]:
        """(step, request, views) of each step.

        Raises:
            BadImageError: a bad file, unless the rule is to skip.
        """
        step = steps.start
        while step < steps.stop:
            try:
                with closing(_made_ahead(request, range(step, steps.stop))) as requests:
                    for made, views in self._backend.run(requests):
                        yield step, made, views
                        step += 1
            except DecodeError as error:
                self._settle(error)

    def _settle(self, error: DecodeError) -> None:
        """Find the files behind a decoder's failure; the next request leaves them out or reads their copies."""
        culprits = set(self._backend.undecodable(error.paths))
        if not culprits:
            raise error  # no file's fault
        with self._lock:
            for index, path in enumerate(self.paths):
                if self._copies.get(index, path) in culprits:
                    self._copy(index)

    def _copy(self, index: int) -> None:
        """Put a copy that every decoder reads in a file's place; the file is bad if Pillow cannot decode it either."""
        path = self.paths[index]
        try:
            image = open_rgb(path)
        except BadImageError as error:
            self._mark(index, error.reason)
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fastuft-")
        copy = Path(self._folder.name) / f"{index}.png"
        image.save(copy, compress_level=1)
        self._copies[index] = str(copy)
        warnings.warn(f"{path}: DALI does not decode it, Pillow does; a temporary PNG copy is read", stacklevel=2)

    def close(self) -> None:
        """Give back threads, memory and temporary files."""
        self._backend.close()
        if self._folder is not None:
            self._folder.cleanup()
