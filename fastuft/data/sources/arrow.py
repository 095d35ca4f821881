"""Images in Arrow files, as written by ``save_to_disk`` of the ``datasets`` library, located without reading them.

An Arrow stream is a sequence of messages, each a header and a body (Arrow columnar format, "Encapsulated message format").
The body of a record batch contains the bytes of its images one after the other, uncompressed, so an image is a range of the
file. To find the ranges, only headers, column offsets and labels are read.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from fastuft.data.images import Located, Rows, numbered
from fastuft.data.sources.blobs import Blob, BlobError
from fastuft.data.sources.columns import class_texts, features_of, image_column, label_column
from fastuft.data.sources.shards import Shards
from fastuft.data.sources.tar_index import DamagedShardError, ShardIndex, Texts, Window

_FILE_MARK = b"ARROW1\0\0"  # precedes the stream in a file of the random access format
_CONTINUES = 0xFFFFFFFF
_PREFIX = struct.Struct("<II")  # mark, bytes of the header
_NEAR, _FAR = 1 << 12, 1 << 18  # bytes per read of a local and of a remote file
_COMPRESSED = "is compressed, so its images cannot be read individually; save it without compression"
_BODY_LENGTH = 3  # index of the field in the header's table Message


class ArrowTables(Shards):
    """The rows of Arrow files, in order.

    Args:
        shards: the files, in order.
        indexes: the index of each file, from :meth:`walk`.
    """

    @staticmethod
    def walk(shard: Blob, suffixes: tuple[str, ...]) -> ShardIndex:
        """Locate the image of each row; rows without bytes have length 0.

        Raises:
            BlobError: the file is damaged, truncated or compressed, or does not have exactly one column of image bytes.
            ValueError: pyarrow is missing.
        """
        try:
            import pyarrow as pa
        except ImportError as error:
            raise ValueError(f"{shard.shown} needs pyarrow; pip install 'fastuft[parquet]'") from error
        try:
            return _walk(shard)
        except (pa.ArrowException, struct.error, OSError) as error:
            if "ecompress" in str(error):  # the body is replaced with zeros, which do not decompress
                raise BlobError(_COMPRESSED) from error
            raise DamagedShardError(f"is not a whole Arrow file ({str(error).splitlines()[0]})") from error

    def _order(self) -> Rows:
        return np.arange(sum(len(index.offsets) for index in self.indexes))

    def path(self, row: int) -> str:
        """See :class:`fastuft.data.images.ImageSource`: the file's path or URL, a slash, the row's number in it."""
        shard, member = self.located(row)
        return Located(f"{self.shards[shard].shown}/{member}", self, row)

    def name(self, row: int) -> str:
        """See :class:`fastuft.data.images.ImageSource`."""
        shard, member = self.located(row)
        return f"{self.shards[shard].name}/{member}"

    def names_of(self, rows: Rows) -> list[str]:
        """See :class:`fastuft.data.images.ImageSource`."""
        return [self.name(row) for row in rows.tolist()]

    def _fetch(self, row: int, offset: int, length: int) -> bytes:
        shard, member = self.located(row)
        return self.shards[shard].read(offset, length, str(member))

    def labels(self) -> tuple[Rows, list[str]] | None:
        """See :class:`fastuft.data.images.ImageSource`: the column of classes, with the names that ``datasets`` stores."""
        texts: list[str] = []
        for index in self.indexes:
            if index.classes is None:
                return None
            texts += [text.decode() for text in index.classes]
        return numbered(texts)


def _walk(shard: Blob) -> ShardIndex:
    import pyarrow as pa

    window = Window(shard, _FAR if shard.remote else _NEAR)
    at = len(_FILE_MARK) if window.read(0, min(shard.size, len(_FILE_MARK))) == _FILE_MARK else 0
    schema = None
    found: list[tuple[Rows, Rows]] = []
    classes: list[str] = []
    while (message := _message(shard, window, at)) is not None:
        whole, header = message
        read = pa.ipc.read_message(pa.py_buffer(whole))
        if schema is None:
            schema = pa.ipc.read_schema(read)
            image, label = image_column(schema), label_column(schema)
        elif read.type == "record batch":
            batch = _Batch(pa.ipc.read_record_batch(read, schema), window, at, whole, header)
            found.append(batch.ranges(image))
            if label is not None:
                classes += class_texts(batch.values(label), label, features_of(schema))
        at += len(whole)
    offsets, lengths = (
        (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else (np.zeros(0, int),) * 2
    )
    if len(lengths) and not lengths.any():
        raise BlobError(
            "has paths of images and no bytes; save the data set with save_to_disk, which includes the bytes"
        )
    names = Texts(np.zeros(0, np.uint8), np.zeros(len(offsets), np.int64))
    said = Texts.of([text.encode() for text in classes]) if schema is not None and label is not None else None
    return ShardIndex(offsets, lengths, names, said)


def _message(shard: Blob, window: Window, at: int) -> tuple[np.ndarray, int] | None:
    """(uint8 [n], bytes before the body) of a message whose body is zeros, which take no memory; None at the end mark."""
    if at + _PREFIX.size > shard.size:
        raise DamagedShardError(f"ends at byte {shard.size} without the end mark, so rows may be missing")
    mark, length = _PREFIX.unpack(window.read(at, _PREFIX.size))
    if mark != _CONTINUES:
        raise DamagedShardError(f"has no Arrow message at byte {at}")
    if length == 0:
        return None
    header = _PREFIX.size + length
    if at + header > shard.size:
        raise DamagedShardError(f"is cut off within a header: it ends at byte {shard.size} of {at + header}")
    content = window.read(at, header)
    size = header + _body_length(content[_PREFIX.size :])
    if at + size > shard.size:
        raise DamagedShardError(f"is cut off within a record batch: it ends at byte {shard.size} of {at + size}")
    whole = np.zeros(size, np.uint8)
    whole[:header] = np.frombuffer(content, np.uint8)
    return whole, header


def _body_length(header: bytes) -> int:
    """The field ``bodyLength`` of a flatbuffer with the root table Message."""
    (table,) = struct.unpack_from("<I", header)
    (back,) = struct.unpack_from("<i", header, table)
    fields = table - back
    (fields_size,) = struct.unpack_from("<H", header, fields)
    slot = 4 + 2 * _BODY_LENGTH
    (offset,) = struct.unpack_from("<H", header, fields + slot) if slot < fields_size else (0,)
    (length,) = struct.unpack_from("<q", header, table + offset) if offset else (0,)
    if length < 0:
        raise DamagedShardError(f"has a record batch of {length} bytes")
    return int(length)


class _Batch:
    """A record batch whose buffers are read on demand.

    Args:
        batch: the batch, in the memory of ``whole``.
        window: reads the file.
        at: first byte of the message in the file.
        whole: the message.
        header: number of bytes before the body.
    """

    def __init__(self, batch: Any, window: Window, at: int, whole: np.ndarray, header: int) -> None:
        self._batch, self._window, self._at, self._whole, self._header = batch, window, at, whole, header

    def _start(self, buffer: Any) -> int:
        """First byte of a buffer in the message."""
        start = int(buffer.address) - self._whole.ctypes.data
        if not self._header <= start <= start + buffer.size <= len(self._whole):
            raise BlobError(_COMPRESSED)
        return start

    def _fill(self, buffers: list[Any]) -> None:
        for buffer in buffers:
            if buffer is not None and buffer.size:
                start = self._start(buffer)
                content = self._window.read(self._at + start, buffer.size)
                self._whole[start : start + buffer.size] = np.frombuffer(content, np.uint8)

    def values(self, column: str) -> list[Any]:
        """The values of a column."""
        found = self._batch.column(column)
        self._fill(found.buffers())
        return list(found.to_pylist())

    def ranges(self, column: str) -> tuple[Rows, Rows]:
        """(offsets, lengths), int64 [n] in the file, of a column of bytes or a field of a struct."""
        from pyarrow import types

        name, _, leaf = column.partition(".")
        outer = self._batch.column(name)
        inner = outer.field(leaf) if leaf else outer
        validity, ends, content = inner.buffers()
        kind = np.dtype(np.int64 if types.is_large_binary(inner.type) else np.int32)
        count = len(inner)
        if count and (ends is None or ends.size < (count + 1) * kind.itemsize):
            raise BlobError(_COMPRESSED)
        self._fill([outer.buffers()[0], validity, ends])
        bounds = np.frombuffer(ends, kind)[inner.offset :][: count + 1].astype(np.int64) if count else np.zeros(1, int)
        lengths = np.diff(bounds)
        there = np.asarray(outer.is_valid()) & np.asarray(inner.is_valid())
        if (lengths < 0).any() or (lengths.any() and (content is None or bounds[-1] > content.size)):
            raise DamagedShardError("has a damaged column of images")
        begin = self._at + self._start(content) if content is not None and content.size else 0
        return begin + bounds[:-1], np.where(there, lengths, 0)
