"""Images in the rows of parquet files, as in data sets of the Hugging Face Hub, read one row group at a time."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from fastuft.data.bad import BadImageError
from fastuft.data.images import ImageSource, Located, Rows, numbered
from fastuft.data.reading import in_threads
from fastuft.data.sources.blobs import Blob, BlobError, say_bad
from fastuft.data.sources.columns import class_texts, features_of, image_column, label_column

_HELD = 512 << 20  # bytes of row groups kept in memory for their other images
_READERS = 16


class _Stream(io.RawIOBase):
    """A blob as a file object for pyarrow."""

    def __init__(self, blob: Blob) -> None:
        self._blob, self._at = blob, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._blob.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        left = self._blob.size - self._at
        length = left if size < 0 else min(size, left)
        content = self._blob.read(self._at, length) if length > 0 else b""
        self._at += len(content)
        return content


class _Table:
    """The footer of one file: its row groups, and the column that holds the images."""

    def __init__(self, blob: Blob) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        self.blob = blob
        try:
            file = parquet.ParquetFile(pa.PythonFile(_Stream(blob), mode="r"))
        except (pa.ArrowException, OSError) as error:
            raise BlobError(f"is not a whole parquet file ({str(error).splitlines()[0]})") from error
        self.footer = file.metadata
        groups = range(self.footer.num_row_groups)
        self.ends = np.cumsum([self.footer.row_group(group).num_rows for group in groups] or [0])
        schema = file.schema_arrow
        self.features = features_of(schema)
        self.column, self.label = image_column(schema), label_column(schema)

    def column_of(self, group: int, column: str) -> Any:
        """One column of a row group; a dotted name selects the field of a struct."""
        import pyarrow as pa
        from pyarrow import parquet

        try:
            file = parquet.ParquetFile(pa.PythonFile(_Stream(self.blob), mode="r"), metadata=self.footer)
            found = file.read_row_group(group, columns=[column], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise BlobError(f"has a damaged row group {group} ({str(error).splitlines()[0]})") from error
        array = found.column(0).combine_chunks()
        return array.field("bytes") if "." in column else array


class Tables(ImageSource):
    """The rows of parquet files, in order.

    Args:
        blobs: the files.

    Raises:
        ValueError: pyarrow is missing, or a file is damaged or does not have exactly one image column.
    """

    def __init__(self, blobs: Sequence[Blob]) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ValueError(f"{blobs[0].shown} needs pyarrow; pip install 'fastuft[parquet]'") from error
        self.remote = any(blob.remote for blob in blobs)
        bad: list[tuple[str, str]] = []

        def look(blob: Blob) -> _Table | None:
            try:
                return _Table(blob)
            except BlobError as error:
                bad.append((blob.shown, str(error)))
                return None

        self._tables = [table for table in in_threads(look, blobs, _READERS, chunk=1) if table is not None]
        if bad:
            raise say_bad(sorted(bad), len(blobs), "parquet files")
        self._ends = np.cumsum([table.footer.num_rows for table in self._tables])
        self._groups: OrderedDict[tuple[int, int], Future[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, row: int) -> tuple[int, int]:
        """(table, row within the table)."""
        table = int(np.searchsorted(self._ends, row, side="right"))
        return table, row - (int(self._ends[table - 1]) if table else 0)

    def path(self, row: int) -> str:
        """See :class:`fastuft.data.images.ImageSource`: the file's path or URL, a slash, the row's number in the file."""
        table, inner = self._locate(row)
        return Located(f"{self._tables[table].blob.shown}/{inner}", self, row)

    def name(self, row: int) -> str:
        """See :class:`fastuft.data.images.ImageSource`."""
        table, inner = self._locate(row)
        return f"{self._tables[table].blob.name}/{inner}"

    def sizes(self, rows: Rows) -> Rows:
        """See :class:`fastuft.data.images.ImageSource`: the file's size, since a row's is known only after reading it."""
        sizes = np.array([table.blob.size for table in self._tables], np.int64)
        return sizes[np.searchsorted(self._ends, rows, side="right")]

    def read(self, row: int) -> bytes:
        """See :class:`fastuft.data.images.ImageSource`; the whole row group is read and kept for its other images."""
        table, inner = self._locate(row)
        ends = self._tables[table].ends
        group = int(np.searchsorted(ends, inner, side="right"))
        try:
            found = self._group(table, group)[inner - (int(ends[group - 1]) if group else 0)]
        except BlobError as error:
            name = self._tables[table].blob.name
            raise BadImageError(self.path(row), f"cannot be read (the file {name} {error})") from error
        content = found.as_buffer().to_pybytes() if found.is_valid else b""
        if not content:
            raise BadImageError(self.path(row), "is empty")
        return bytes(content)

    def _group(self, table: int, group: int) -> Any:
        """The images of a row group; if several threads need it, one of them reads it."""
        key = (table, group)
        with self._lock:
            known = self._groups.get(key)
            if known is not None:
                self._groups.move_to_end(key)
            else:
                reading = self._groups[key] = Future[Any]()
        if known is not None:
            return known.result()
        try:
            found = self._tables[table].column_of(group, self._tables[table].column)
        except BaseException as error:
            with self._lock:
                self._groups.pop(key, None)
            reading.set_exception(error)
            raise
        reading.set_result(found)
        with self._lock:
            done = [(each, future) for each, future in self._groups.items() if future.done() and each != key]
            held = found.nbytes + sum(future.result().nbytes for _, future in done)
            for each, future in done:
                if held <= _HELD:
                    break
                held -= future.result().nbytes
                del self._groups[each]
        return found

    def version(self, row: int) -> int:
        """See :class:`fastuft.data.images.ImageSource`: it changes with the file."""
        digest = hashlib.blake2b(self._tables[self._locate(row)[0]].blob.tag.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    def containers(self) -> frozenset[str]:
        """See :class:`fastuft.data.images.ImageSource`."""
        return frozenset(
            table.blob.shown if table.blob.remote else os.path.realpath(table.blob.shown) for table in self._tables
        )

    def labels(self) -> tuple[Rows, list[str]] | None:
        """See :class:`fastuft.data.images.ImageSource`: the column of classes, with the names that ``datasets`` stores."""
        texts: list[str] = []
        for table in self._tables:
            if table.label is None:
                return None
            for group in range(table.footer.num_row_groups):
                texts += class_texts(table.column_of(group, table.label).to_pylist(), table.label, table.features)
        return numbered(texts)
