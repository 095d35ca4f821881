"""The header of an encoded image: its format, size and orientation.

The bytes are parsed once, and the result holds for every decoder. The orientation comes from the EXIF tag alone; a damaged
tag means upright. Other metadata is ignored.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Format = Literal["JPEG", "PNG", "WebP", "BMP", "other"]  # other: formats that only Pillow decodes

_ORIENTATION, _SHORT = 0x0112, 3  # EXIF tag and its type
_EXIF_PREFIX = b"Exif\0\0"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG_SIZES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # start of frame; the others are tables
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
_JPEG_KEPT = frozenset({0xE0, 0xEE})  # application segments that pixels depend on: JFIF, Adobe's color transform
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_WEBP_KEPT = frozenset({b"VP8X", b"ALPH", b"VP8 ", b"VP8L", b"ANIM", b"ANMF"})
_PNG_TEXTS = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})
_BMP_HEADERS = frozenset(struct.pack("<I", size) for size in (12, 16, 40, 52, 56, 64, 108, 124))
_WEBP_METADATA, _WEBP_EXIF = 0x2C, 0x08  # flags of VP8X: color profile, EXIF and XMP; EXIF


class DamagedHeaderError(ValueError):
    """An image whose header cannot be understood."""


@dataclass(frozen=True, slots=True)
class Header:
    """The header of an encoded image.

    Args:
        format: format of the file.
        width: stored width, pixels.
        height: stored height, pixels.
        orientation: EXIF's orientation, 1 to 8; 1 is upright.
        whole: whether the file has an end marker, for formats that have one.
        described: whether it has metadata that some decoder may take an orientation from.
    """

    format: Format
    width: int
    height: int
    orientation: int = 1
    whole: bool = True
    described: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright image."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG, PNG, WebP or BMP file; None for anything else.

    Raises:
        DamagedHeaderError: it has one of those formats, but its header makes no sense.
    """
    parse = _parser_of(data)
    if parse is None:
        return None
    try:
        header = parse(data)
    except (struct.error, IndexError) as error:
        raise DamagedHeaderError("ends within its header") from error
    if header.width < 1 or header.height < 1:
        raise DamagedHeaderError(f"claims {header.width} x {header.height} pixels")
    return header


def _parser_of(data: bytes) -> Callable[[bytes], Header] | None:
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg
    if data[:8] == _PNG_START:
        return _png
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp
    if data[:2] == b"BM" and data[14:18] in _BMP_HEADERS:
        return _bmp
    return None


def orientation_of(exif: bytes) -> int:
    """EXIF's orientation, 1 to 8, from a block of tags (a TIFF structure); 1 if it is missing or damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        if order is None:
            return 1
        (first,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, first)
        for entry in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if tag == _ORIENTATION:
                entry_is_whole = entry + 12 <= len(exif)
                return value if kind == _SHORT and values == 1 and 1 <= value <= 8 and entry_is_whole else 1
    except struct.error:
        pass  # truncated
    return 1


def plain(data: bytes, header: Header, *, orientation: int = 1) -> bytes:
    """The same image without metadata, so that decoders cannot trip over it.

    Args:
        data: the file.
        header: its header.
        orientation: value of the only EXIF tag to write, for decoders; 1 writes none.
    """
    exif = _exif(orientation) if orientation > 1 else b""
    if header.format == "JPEG":
        segments = [
            data[start:end]
            for marker, start, end in _jpeg_segments(data)
            if marker < 0xE0 or marker in _JPEG_KEPT or 0xF0 <= marker < 0xFE
        ]
        block = _EXIF_PREFIX + exif
        own = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block if exif else b""
        return b"".join([data[:2], own, *segments])
    if header.format == "PNG":
        chunks = [data[start:end] for name, start, end in _png_chunks(data) if name in _PNG_KEPT]
        if exif:
            checksum = struct.pack(">I", zlib.crc32(b"eXIf" + exif))
            chunks.insert(1, struct.pack(">I", len(exif)) + b"eXIf" + exif + checksum)
        return _PNG_START + b"".join(chunks)
    if header.format == "WebP":
        kept = bytearray()
        for name, start, end in _webp_chunks(data):
            if name in _WEBP_KEPT:
                at = len(kept)
                kept += data[start:end] + b"\0" * ((end - start) % 2)
                if name == b"VP8X":
                    kept[at + 8] = kept[at + 8] & ~_WEBP_METADATA & 0xFF | (_WEBP_EXIF if exif else 0)
        if exif:
            kept += b"EXIF" + struct.pack("<I", len(exif)) + exif
        return b"RIFF" + struct.pack("<I", 4 + len(kept)) + b"WEBP" + bytes(kept)
    return data


def _exif(orientation: int) -> bytes:
    """An EXIF block with only this tag."""
    return b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, _ORIENTATION, _SHORT, 1, orientation, 0, 0)


def _exif_orientation(block: bytes) -> int:
    """The orientation in a block that may begin with EXIF's prefix."""
    return orientation_of(block.removeprefix(_EXIF_PREFIX))


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment; the last one is the start of scan with everything after it.

    Raises:
        IndexError, struct.error: the file ends before the scan.
    """
    at = 2
    while True:
        start = data.find(b"\xff", at)  # some writers leave bytes between segments
        if start < 0:
            raise IndexError("no further segment")
        at = start + 1
        while data[at] == 0xFF:  # fill bytes
            at += 1
        marker = data[at]
        at += 1
        if marker == 0xDA:
            yield marker, start, len(data)
            return
        if marker == 0 or marker in _JPEG_BARE:
            continue
        if marker == 0xD9:
            raise DamagedHeaderError("ends before its pixels")
        end = at + struct.unpack_from(">H", data, at)[0]
        yield marker, start, end
        at = end


def _jpeg(data: bytes) -> Header:
    width = height = 0
    orientation = None
    described = False
    for marker, start, end in _jpeg_segments(data):
        if marker in _JPEG_SIZES:
            height, width = struct.unpack_from(">HH", data, start + 5)
        elif marker == 0xE1:
            described = True
            if orientation is None and data[start + 4 : start + 10] == _EXIF_PREFIX:
                orientation = orientation_of(data[start + 10 : end])
        elif marker == 0xDA:
            # Some writers append bytes after the end marker; phones append whole videos.
            whole = data.rfind(b"\xff\xd9", start) > start
            return Header("JPEG", width, height, orientation or 1, whole, described)
    raise AssertionError("segments end with the scan")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each chunk, including its length and checksum; the last may be truncated."""
    at = 8
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        yield name, at, end
        if name == b"IEND":
            return
        at = end


def _png(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 16)
    if data[12:16] != b"IHDR":
        raise DamagedHeaderError("does not begin with its header")
    orientation, whole, described = 1, False, False
    for name, start, end in _png_chunks(data):
        described |= name in _PNG_TEXTS
        if name == b"eXIf":
            orientation = _exif_orientation(data[start + 8 : end - 4])
        whole = name == b"IEND"
    return Header("PNG", width, height, orientation, whole, described)


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each chunk; end excludes the byte that pads odd lengths."""
    at = 12
    while at + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        yield name, at, at + 8 + length
        at += 8 + length + length % 2


def _webp(data: bytes) -> Header:
    width = height = 0
    orientation, described = 1, False
    for name, start, end in _webp_chunks(data):
        described |= name in (b"EXIF", b"XMP ")
        if name == b"EXIF":
            orientation = _exif_orientation(data[start + 8 : end])
        elif width == 0 and name == b"VP8X":
            width, height = (int.from_bytes(data[start + at : start + at + 3], "little") + 1 for at in (12, 15))
        elif width == 0 and name == b"VP8 ":
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, start + 14))
        elif width == 0 and name == b"VP8L":
            (bits,) = struct.unpack_from("<I", data, start + 9)
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    declared = int.from_bytes(data[4:8], "little") + 8
    whole = declared <= len(data) + 1  # some writers omit the last padding byte
    return Header("WebP", width, height, orientation, whole, described)


def _bmp(data: bytes) -> Header:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header_bytes == 12 else "<ii", data, 18)
    return Header("BMP", width, abs(height))  # a negative height stores rows from the top
