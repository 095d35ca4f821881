"""Sequences of images, and the interface through which files, shards and tables list and read them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

_AT_ONCE = 1 << 16  # images whose names are made together


class ImageSource(ABC):
    """A set of stored images: files, shards or tables. Rows count from 0, in the order of training."""

    remote: bool = False  # whether reading goes over a network
    plain: bool = False  # whether the images are local files, which are read by path alone

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def path(self, row: int) -> str:
        """The image's path or URL, for messages, saved lists and :func:`fastuft.data.read_bytes`."""

    @abstractmethod
    def name(self, row: int) -> str:
        """The image's name, relative to the source's location; names and sizes together identify the data."""

    def names_of(self, rows: Rows) -> list[str]:
        """The names of many images."""
        return [self.name(row) for row in rows.tolist()]

    @abstractmethod
    def sizes(self, rows: Rows) -> Rows:
        """Sizes in bytes [n], which distinguish images of the same name; -1 if unknown."""

    @abstractmethod
    def read(self, row: int) -> bytes:
        """The encoded image.

        Raises:
            BadImageError: it cannot be read, is empty, or has changed since it was listed.
        """

    @abstractmethod
    def version(self, row: int) -> int:
        """A number that changes when the stored image may have changed, 0 to 2**63 - 1."""

    def containers(self) -> frozenset[str]:
        """Paths or URLs of the shards, tables or objects that hold the images, with links resolved; empty for files."""
        return frozenset()

    def labels(self) -> tuple[Rows, list[str]] | None:
        """(label of each row, class names), or None if the images have no classes."""
        return folder_labels(self.name(row) for row in range(len(self)))


class Located(str):
    """The path or URL of an image that is not a plain file, with the source that reads it."""

    __slots__ = ("row", "source")
    source: ImageSource
    row: int

    def __new__(cls, text: str, source: ImageSource, row: int) -> Located:
        """``text`` is what messages show."""
        located = super().__new__(cls, text)
        located.source, located.row = source, row
        return located

    def __str__(self) -> str:
        return self  # str(located) keeps its source

    def __reduce__(self) -> tuple[Any, ...]:
        return str, ("".join(self),)  # another process does not have the source and gets plain text

    def read(self) -> bytes:
        """The encoded image; see :meth:`ImageSource.read`."""
        return self.source.read(self.row)


class Images(Sequence[str]):
    """Images of one or several sources, in order. Stores two numbers per image and builds paths on request.

    Args:
        sources: the sources.
        which: int32 [N], index into ``sources``.
        rows: int64 [N], row within that source.
    """

    def __init__(self, sources: Sequence[ImageSource], which: np.ndarray, rows: Rows) -> None:
        self.sources, self.which, self.rows = tuple(sources), which, rows

    @classmethod
    def of(cls, sources: Sequence[ImageSource]) -> Images:
        """All images of the sources, one source after the other."""
        counts = [len(source) for source in sources]
        which = np.repeat(np.arange(len(sources), dtype=np.int32), counts)
        return cls(sources, which, np.concatenate([np.arange(count) for count in counts] or [np.zeros(0, np.int64)]))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Images: ...

    def __getitem__(self, index: int | slice) -> str | Images:
        if isinstance(index, slice):
            return Images(self.sources, self.which[index], self.rows[index])
        return self.sources[int(self.which[index])].path(int(self.rows[index]))

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # not hashable, like a list

    @property
    def remote(self) -> bool:
        """Whether reading any of them goes over a network."""
        return any(self.sources[which].remote for which in np.unique(self.which))

    @property
    def only_files(self) -> bool:
        """Whether all of them are local files."""
        return all(source.plain for source in self.sources)

    def take(self, rows: Sequence[int] | np.ndarray) -> Images:
        """The images at the given positions."""
        index = np.asarray(rows, np.int64)
        return Images(self.sources, self.which[index], self.rows[index])

    def followed_by(self, other: Images) -> Images:
        """These images followed by those of ``other``."""
        which = np.concatenate([self.which, other.which + len(self.sources)]).astype(np.int32)
        return Images(self.sources + other.sources, which, np.concatenate([self.rows, other.rows]))

    def names(self) -> Iterator[str]:
        """Each image's name, relative to its source."""
        for start in range(0, len(self), _AT_ONCE):
            which, rows = self.which[start : start + _AT_ONCE], self.rows[start : start + _AT_ONCE]
            found = np.empty(len(rows), object)
            for number, mine in grouped(which):
                found[mine] = self.sources[number].names_of(rows[mine])
            yield from found

    def sizes(self) -> Rows:
        """See :meth:`ImageSource.sizes`."""
        found = np.empty(len(self), np.int64)
        for which in np.unique(self.which):
            mine = self.which == which
            found[mine] = self.sources[which].sizes(self.rows[mine])
        return found


def grouped(numbers: np.ndarray) -> Iterator[tuple[int, Rows]]:
    """(number, its positions) for each different number, in one pass however many there are."""
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    for positions in np.split(order, starts[1:]):
        if len(positions):
            yield int(numbers[positions[0]]), positions


def is_remote(paths: Sequence[str]) -> bool:
    """Whether reading these images goes over a network."""
    if isinstance(paths, Images):
        return paths.remote
    return any(isinstance(path, Located) and path.source.remote for path in paths[:1])


def size_and_version(path: str) -> tuple[int, int]:
    """(bytes, a number that changes with the content) of an image, without reading it.

    Raises:
        OSError: the file does not exist.
    """
    if isinstance(path, Located):
        size = int(path.source.sizes(np.array([path.row]))[0])
        return size, path.source.version(path.row)
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def labels_of_images(paths: Sequence[str]) -> tuple[Rows, list[str]] | None:
    """(label of each image, class names) of shards and tables; None for plain files and if there are no classes."""
    if not isinstance(paths, Images) or paths.only_files:
        return None
    texts = np.empty(len(paths), object)
    for which in np.unique(paths.which).tolist():
        found = paths.sources[which].labels()
        if found is None:
            return None
        mine = paths.which == which
        texts[mine] = np.array(found[1], object)[found[0]][paths.rows[mine]]
    return numbered(texts.tolist())


def folder_labels(names: Iterable[str]) -> tuple[Rows, list[str]] | None:
    """(labels, class names) from the first folder of each name below their common folder; None without folders."""
    folders = [name.split("/")[:-1] for name in names]
    if not folders:
        return None
    first, last = min(folders), max(folders)
    depth = next((at for at, parts in enumerate(zip(first, last, strict=False)) if len({*parts}) > 1), len(first))
    if any(len(folder) <= depth for folder in folders):
        return None
    return numbered([folder[depth] for folder in folders])


def numbered(labels: Sequence[str]) -> tuple[Rows, list[str]]:
    """(number of each label, labels); labels are sorted by value if all are whole numbers, else as text."""
    found = set(labels)
    whole = all(label.isascii() and label.isdecimal() for label in found)
    classes = sorted(found, key=(lambda label: (int(label), label)) if whole else (lambda label: (0, label)))
    position = {label: number for number, label in enumerate(classes)}
    return np.fromiter((position[label] for label in labels), np.int64, len(labels)), classes
