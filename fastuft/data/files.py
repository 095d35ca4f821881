"""Local files as a source of images."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from fastuft.data.images import ImageSource, Rows
from fastuft.data.reading import READERS, in_threads, read_bytes


class Files(ImageSource):
    """Local files.

    Args:
        paths: absolute paths.
        names: the same files, relative to the location that was listed.
    """

    plain = True

    def __init__(self, paths: Sequence[str], names: Sequence[str]) -> None:
        self.paths, self.names = paths, names

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> str:
        """See :class:`ImageSource`."""
        return self.paths[row]

    def name(self, row: int) -> str:
        """See :class:`ImageSource`."""
        return self.names[row]

    def sizes(self, rows: Rows) -> Rows:
        """See :class:`ImageSource`."""

        def size(row: int) -> int:
            try:
                return os.path.getsize(self.paths[row])
            except OSError:
                return -1  # missing files are handled by the streams, as data.on_bad_file says

        return np.fromiter(in_threads(size, rows.tolist(), READERS), np.int64, len(rows))

    def read(self, row: int) -> bytes:
        """See :class:`ImageSource`."""
        return read_bytes(self.paths[row])

    def version(self, row: int) -> int:
        """See :class:`ImageSource`: the modification time, nanoseconds."""
        return os.stat(self.paths[row]).st_mtime_ns
