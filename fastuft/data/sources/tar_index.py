"""The index of a tar shard: where its images are. One pass over the headers builds it; the cache folder keeps it."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastuft.atomic import whole_file
from fastuft.data.left_out import LeftOut, image_names
from fastuft.data.sources.blobs import Blob, BlobError, ChangedBlobError

BLOCK = 512
_FORMAT = 1  # version of the cached files
_LARGEST_EXTRA = 1 << 20  # largest long name, extended header or class, bytes
_NEAR, _FAR = 1 << 12, 8 << 20  # bytes per read of a local and of a remote shard
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NAME_BYTES = 100  # length of the name field of a header; longer names are in a header of their own


class DamagedShardError(BlobError):
    """A shard whose headers cannot be read to the end."""


@dataclass
class Texts:
    """Many short texts in one buffer.

    Args:
        blob: uint8, the concatenated texts.
        ends: int64 [n], the end of each text in ``blob``.
    """

    blob: np.ndarray[Any, np.dtype[np.uint8]]
    ends: np.ndarray[Any, np.dtype[np.int64]]

    @classmethod
    def of(cls, texts: list[bytes]) -> Texts:
        """Pack texts into one buffer."""
        ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
        return cls(np.frombuffer(b"".join(texts), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> bytes:
        start = int(self.ends[row - 1]) if row else 0
        return self.blob[start : int(self.ends[row])].tobytes()

    def take(self, rows: np.ndarray[Any, np.dtype[np.integer[Any]]]) -> list[bytes]:
        """Those at many positions."""
        view = self.blob.data
        starts = np.where(rows > 0, self.ends[rows - 1], 0)
        return [view[start:end].tobytes() for start, end in zip(starts.tolist(), self.ends[rows].tolist(), strict=True)]

    def __iter__(self) -> Iterator[bytes]:
        return (self[row] for row in range(len(self)))

    @property
    def whole(self) -> bool:
        """Whether the ends are ascending and cover the buffer exactly."""
        lengths = np.diff(self.ends, prepend=0)
        last = int(self.ends[-1]) if len(self.ends) else 0
        return bool((lengths >= 0).all()) and last == len(self.blob)


@dataclass
class ShardIndex:
    """The images of one shard, in the order in which it stores them.

    Args:
        offsets: int64 [n], first byte of each image.
        lengths: int64 [n], size of each image in bytes.
        names: names with folders, without a leading ``./``.
        classes: content of each image's ``.cls`` file; None if the shard has no such files.
        left_out: the other members.
    """

    offsets: np.ndarray[Any, np.dtype[np.int64]]
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    names: Texts
    classes: Texts | None = None
    left_out: LeftOut = field(default_factory=LeftOut)

    def fits(self, size: int) -> bool:
        """Whether the index is consistent with a shard of ``size`` bytes."""
        count = len(self.offsets)
        return (
            len(self.lengths) == len(self.names) == count
            and (self.classes is None or (len(self.classes) == count and self.classes.whole))
            and self.names.whole
            and bool((self.offsets >= 0).all() and (self.lengths >= 0).all())
            and bool((self.offsets + self.lengths <= size).all())
        )


class Window:
    """Reads a shard in large parts, so that many headers come with one read.

    Args:
        shard: the shard.
        span: bytes per read, at least.
    """

    def __init__(self, shard: Blob, span: int) -> None:
        self._shard, self._span = shard, span
        self._start, self._held = 0, b""

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on, all within the shard."""
        at = offset - self._start
        if not 0 <= at <= at + length <= len(self._held):
            span = min(max(self._span, length), self._shard.size - offset)
            self._held, self._start, at = self._shard.read(offset, span), offset, 0
        return self._held[at : at + length]


def member_name(raw: str) -> str:
    """A member's name as a relative path, without ``.``, ``..`` and leading slashes."""
    parts = [part for part in raw.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)


def walk(shard: Blob, suffixes: tuple[str, ...]) -> ShardIndex:
    """Build the index of a shard from its headers.

    Raises:
        DamagedShardError: it is compressed, is cut off, lacks the end-of-archive mark, or has a damaged header.
        BlobError: it cannot be read.
    """
    is_image = image_names(suffixes)
    found: dict[str, tuple[int, int]] = {}  # a later member replaces an earlier one of the same name
    classes: dict[str, bytes] = {}
    left_out = LeftOut()
    window = Window(shard, _FAR if shard.remote else _NEAR)
    for name, offset, length, regular in _members(shard, window):
        if not regular:
            if is_image(name):
                left_out.others["links"] += 1
        elif name.lower().endswith(".cls"):
            classes[name[: -len(".cls")]] = window.read(offset, min(length, _LARGEST_EXTRA)).strip()
        elif left_out.takes(name, is_image):
            found.pop(name, None)
            found[name] = offset, length
    spans = np.array(list(found.values()), np.int64).reshape(-1, 2)
    return ShardIndex(
        np.ascontiguousarray(spans[:, 0]),
        np.ascontiguousarray(spans[:, 1]),
        Texts.of([name.encode(errors="surrogateescape") for name in found]),
        Texts.of([_class_of(name, classes) for name in found]) if classes and found else None,
        left_out,
    )


def _class_of(name: str, classes: dict[str, bytes]) -> bytes:
    """The class of a member. In WebDataset, the files of a sample share the base name up to its first dot."""
    folder, slash, last = name.rpartition("/")
    return classes.get(folder + slash + last.partition(".")[0], b"") or classes.get(name.rpartition(".")[0], b"")


def _members(shard: Blob, window: Window) -> Iterator[tuple[str, int, int, bool]]:
    """(name, offset, length, whether it is a regular file) of each file and link."""
    at, long_name, extended = 0, "", dict[str, str]()
    while True:
        if at + BLOCK > shard.size:
            raise DamagedShardError(
                f"ends at byte {shard.size} without the end-of-archive mark, so images may be missing"
            )
        block = window.read(at, BLOCK)
        if not any(block):
            return
        header = _header(block, at)
        start, length = at + BLOCK, int(extended.get("size", header.size))
        filed = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        extra = header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise DamagedShardError(f"contains the sparse file {header.name}; pack it without --sparse")
        name = extended.get("path") or long_name or header.name
        if (filed or extra) and start + length > shard.size:
            raise DamagedShardError(f"is cut off within {name}: it ends at byte {shard.size} of {start + length}")
        at = start + (-(-length // BLOCK) * BLOCK if filed or extra else 0)
        if extra:
            if length > _LARGEST_EXTRA:
                raise DamagedShardError(f"has a header of {length} bytes at byte {start - BLOCK}")
            content = window.read(start, length)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode(errors="surrogateescape")
            elif header.type == tarfile.XHDTYPE:
                extended = _extended(content, start)
            continue
        if header.type in _REGULAR or header.islnk() or header.issym():
            yield member_name(name), start, length, header.type in _REGULAR
        long_name, extended = "", {}


def _header(block: bytes, at: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        packed = block[:2] == b"\x1f\x8b" or block[:3] == b"BZh" or block[:4] in (b"\xfd7zX", b"\x28\xb5\x2f\xfd")
        if at == 0 and packed:
            raise DamagedShardError("is compressed and cannot be read in parts; decompress it to .tar") from error
        raise DamagedShardError(f"has no valid header at byte {at} ({error})") from error


def _extended(content: bytes, at: int) -> dict[str, str]:
    """The records of an extended header (POSIX pax), each ``length key=value`` and a line end."""
    found = {}
    try:
        while content:
            length = int(content[: content.index(b" ")])
            key, value = content[:length].split(b" ", 1)[1].rstrip(b"\n").split(b"=", 1)
            if length < 5:
                raise ValueError(f"a record of {length} bytes")
            found[key.decode()] = value.decode(errors="surrogateescape")
            content = content[length:]
        int(found.get("size", "0"))
    except (ValueError, IndexError) as error:
        raise DamagedShardError(f"has a damaged extended header at byte {at} ({error})") from error
    return found


def check_member(block: bytes, name: str, length: int) -> None:
    """Check that a member's header, the block before its content, agrees with the index.

    Raises:
        ChangedBlobError: it does not.
    """
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        elsewhere = not name.isascii() or len(name) > _NAME_BYTES  # the name may be in a header of its own
        fits = header.size == length and (elsewhere or member_name(header.name) == name)
    except tarfile.HeaderError:
        fits = False
    if not fits:
        raise ChangedBlobError("has changed since the shard was indexed; start again to rebuild the index")


def kept_index(shard: Blob, suffixes: tuple[str, ...], folder: Path | None) -> ShardIndex | None:
    """The cached index of this version of the shard; None if there is none, or it is damaged."""
    if folder is None:
        return None
    try:
        with np.load(_file(shard, suffixes, folder), allow_pickle=False) as kept:
            about = json.loads(kept["about"].tobytes())
            if about["format"] != _FORMAT or (about["size"], about["tag"]) != (shard.size, shard.tag):
                return None
            classes = Texts(kept["classes"], kept["class_ends"]) if about["classes"] else None
            left_out = LeftOut(Counter(about["others"]), Counter(about["junk"]))
            names = Texts(kept["names"], kept["name_ends"])
            index = ShardIndex(kept["offsets"], kept["lengths"], names, classes, left_out)
            return index if index.fits(shard.size) else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def keep_index(index: ShardIndex, shard: Blob, suffixes: tuple[str, ...], folder: Path | None) -> None:
    """Cache an index; if it cannot be written, the next run builds it again."""
    if folder is None:
        return
    about = {"format": _FORMAT, "size": shard.size, "tag": shard.tag, "classes": index.classes is not None}
    about |= {"others": index.left_out.others, "junk": index.left_out.junk}
    arrays: dict[str, np.ndarray] = {"offsets": index.offsets, "lengths": index.lengths}
    arrays |= {"names": index.names.blob, "name_ends": index.names.ends}
    if index.classes is not None:
        arrays |= {"classes": index.classes.blob, "class_ends": index.classes.ends}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(_file(shard, suffixes, folder), flush=False) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError:
        pass  # the cache only saves time


def _file(shard: Blob, suffixes: tuple[str, ...], folder: Path) -> Path:
    key = "\0".join([shard.shown, *suffixes]).encode(errors="surrogateescape")
    return folder / f"{hashlib.blake2b(key, digest_size=16).hexdigest()}.npz"
