"""Images in tar shards (WebDataset's layout or any other), read without unpacking through an index of their members."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from filelock import FileLock

from fastuft.console import progress_bar
from fastuft.data.bad import BadImageError
from fastuft.data.images import ImageSource, Located, Rows, folder_labels, grouped, numbered
from fastuft.data.left_out import LeftOut
from fastuft.data.reading import LARGEST, in_threads
from fastuft.data.sources.blobs import Blob, BlobError, say_bad
from fastuft.data.sources.tar_index import (
    BLOCK,
    ShardIndex,
    Texts,
    check_member,
    keep_index,
    kept_index,
    walk,
)

_WALKERS = {False: min(8, os.cpu_count() or 1), True: 16}  # shards indexed at once, by whether they are remote
_SORTED_AT_ONCE = 1 << 30  # bytes of padded names that are sorted by numpy


class Shards(ImageSource):
    """The images of tar shards, sorted by name, as in the folder that the shards would unpack to.

    Args:
        shards: the shards; of images with the same name, the earlier shard's comes first.
        indexes: the index of each shard.
    """

    def __init__(self, shards: Sequence[Blob], indexes: Sequence[ShardIndex]) -> None:
        self.shards = shards
        self.remote = any(shard.remote for shard in shards)
        self.indexes = indexes
        self._versions = [_version(shard) for shard in shards]
        counts = [len(index.offsets) for index in indexes]
        order = self._order()
        self._shard = np.repeat(np.arange(len(shards), dtype=np.int32), counts)[order]
        self._member = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])[order]

    @staticmethod
    def walk(shard: Blob, suffixes: tuple[str, ...]) -> ShardIndex:
        """Build the index of a shard; see :func:`fastuft.data.sources.tar_index.walk`."""
        return walk(shard, suffixes)

    def _order(self) -> Rows:
        """The order of all members, counted shard by shard: by name, as in the folder that they unpack to."""
        return _by_name([index.names for index in self.indexes])

    @classmethod
    def open(cls, shards: Sequence[Blob], suffixes: tuple[str, ...], cache: Path | None) -> tuple[Shards, LeftOut]:
        """Open shards with their cached indexes; missing or outdated indexes are built by several threads.

        If several processes on a machine open the same shards, one builds the indexes and the others load them.

        Raises:
            ValueError: a shard is damaged or cannot be read.
        """
        bad: list[tuple[str, str]] = []

        def make(shard: Blob) -> ShardIndex | BlobError:
            try:
                index = cls.walk(shard, suffixes)
            except BlobError as error:
                return error
            keep_index(index, shard, suffixes, cache)
            return index

        def kept(shard: Blob) -> ShardIndex | None:
            return kept_index(shard, suffixes, cache)

        workers = _WALKERS[any(shard.remote for shard in shards)]
        found: list[ShardIndex | None] = list(in_threads(kept, shards, workers, chunk=4))
        if None in found:
            with _alone(cache):
                missing = [row for row, index in enumerate(found) if index is None]
                for row in missing:  # another process may have built it meanwhile
                    found[row] = kept(shards[row])
                missing = [row for row in missing if found[row] is None]
                with progress_bar(len(missing), unit="shard") as bar:
                    made = in_threads(make, [shards[row] for row in missing], workers, chunk=1)
                    for row, index in zip(missing, made, strict=True):
                        if isinstance(index, BlobError):
                            bad.append((shards[row].shown, str(index)))
                        else:
                            found[row] = index
                        bar.update(1)
        if bad:
            raise say_bad(bad, len(shards), "shards")
        indexes = [index for index in found if index is not None]
        left_out = LeftOut()
        for index in indexes:
            left_out.add(index.left_out)
        return cls(shards, indexes), left_out

    def __len__(self) -> int:
        return len(self._shard)

    def located(self, row: int) -> tuple[int, int]:
        """(shard, member of it) of a row."""
        return int(self._shard[row]), int(self._member[row])

    def path(self, row: int) -> str:
        """See :class:`fastuft.data.images.ImageSource`: the shard's path or URL, a slash, the member's name."""
        return Located(f"{self.shards[int(self._shard[row])].shown}/{self.name(row)}", self, row)

    def name(self, row: int) -> str:
        """See :class:`fastuft.data.images.ImageSource`: the member's name."""
        shard, member = self.located(row)
        return os.fsdecode(self.indexes[shard].names[member])

    def names_of(self, rows: Rows) -> list[str]:
        """See :class:`fastuft.data.images.ImageSource`."""
        found = np.empty(len(rows), object)
        shards, members = self._shard[rows], self._member[rows]
        for shard, mine in grouped(shards):
            found[mine] = [os.fsdecode(name) for name in self.indexes[shard].names.take(members[mine])]
        return list(found)

    def sizes(self, rows: Rows) -> Rows:
        """See :class:`fastuft.data.images.ImageSource`."""
        found = np.empty(len(rows), np.int64)
        shards, members = self._shard[rows], self._member[rows]
        for shard, mine in grouped(shards):
            found[mine] = self.indexes[shard].lengths[members[mine]]
        return found

    def read(self, row: int) -> bytes:
        """See :class:`fastuft.data.images.ImageSource`; the member's header is read too and checked against the index."""
        number, member = self.located(row)
        index = self.indexes[number]
        offset, length = int(index.offsets[member]), int(index.lengths[member])
        if not 0 < length <= LARGEST:
            raise BadImageError(self.path(row), f"has {length} bytes, more than {LARGEST}" if length else "is empty")
        try:
            return self._fetch(row, offset, length)
        except BlobError as error:
            reason = f"cannot be read (the shard {self.shards[number].name} {error})"
            raise BadImageError(self.path(row), reason) from error

    def _fetch(self, row: int, offset: int, length: int) -> bytes:
        """The bytes of an image, after a check that the index is right about them."""
        name = self.name(row)
        content = self.shards[int(self._shard[row])].read(offset - BLOCK, BLOCK + length, name)
        check_member(content[:BLOCK], name, length)
        return content[BLOCK:]

    def version(self, row: int) -> int:
        """See :class:`fastuft.data.images.ImageSource`: it changes with the shard."""
        return self._versions[int(self._shard[row])]

    def containers(self) -> frozenset[str]:
        """See :class:`fastuft.data.images.ImageSource`."""
        return frozenset(shard.shown if shard.remote else os.path.realpath(shard.shown) for shard in self.shards)

    def labels(self) -> tuple[Rows, list[str]] | None:
        """See :class:`fastuft.data.images.ImageSource`: from ``.cls`` files, otherwise from the members' folders.

        Raises:
            ValueError: some images have a ``.cls`` file and others do not.
        """
        if all(index.classes is None for index in self.indexes):
            return folder_labels(self.names_of(np.arange(len(self))))
        found = []
        for row in range(len(self)):
            classes = self.indexes[int(self._shard[row])].classes
            label = classes[int(self._member[row])].decode(errors="replace") if classes is not None else ""
            if not label:
                raise ValueError(
                    f"{self.path(row)} has no .cls file, but other images have one; add the missing .cls files"
                )
            found.append(label)
        return numbered(found)


def _version(shard: Blob) -> int:
    digest = hashlib.blake2b(f"{shard.size} {shard.tag}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _alone(cache: Path | None) -> FileLock | nullcontext[None]:
    if cache is None:
        return nullcontext()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return nullcontext()
    return FileLock(cache / ".lock")


def _by_name(names: Sequence[Texts]) -> np.ndarray:
    """The order of all names by their bytes; of equal names, the earlier shard's comes first."""
    ends = np.concatenate([np.diff(each.ends, prepend=0) for each in names])
    widest = int(ends.max(initial=0))
    if widest * len(ends) > _SORTED_AT_ONCE:
        flat = [name for each in names for name in each]
        return np.array(sorted(range(len(flat)), key=flat.__getitem__), np.int64)
    padded = np.zeros((len(ends), max(1, widest)), np.uint8)
    row = 0
    for each in names:
        lengths = np.diff(each.ends, prepend=0)
        padded[row : row + len(each)][np.arange(padded.shape[1]) < lengths[:, None]] = each.blob
        row += len(each)
    return np.argsort(padded.view(f"S{padded.shape[1]}").ravel(), kind="stable")
