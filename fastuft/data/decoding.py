"""Detecting bad images before a decoder sees them, and decoding with Pillow."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from PIL import Image

from fastuft.data.bad import BadFile, BadImageError
from fastuft.data.encoded import DamagedHeaderError, Header, plain, read_header
from fastuft.data.left_out import IMAGE_SUFFIXES
from fastuft.data.reading import READ_TIMEOUT, ReaderPool, read_bytes, readers_for

MAX_MEGAPIXELS = 180.0
_MAX_ASPECT = 100.0
_VERIFIED_AT_ONCE = 256  # files
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# ``max_megapixels`` limits the size of images; Pillow's own warning would only be noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A file's bytes and their header."""

    path: str
    data: bytes
    header: Header


def read_image(path: str, max_megapixels: float = MAX_MEGAPIXELS) -> EncodedImage:
    """A file's bytes after cheap checks.

    Raises:
        BadImageError: the file cannot be read, is not an image whatever its name, is larger than ``max_megapixels``, or has
            an extreme aspect. A missing end is left to :func:`check_whole`.
    """
    data = read_bytes(path)
    try:
        header = read_header(data) or _other_header(path, data)
    except DamagedHeaderError as error:
        raise BadImageError(path, f"has a damaged header ({error})") from error
    width, height = header.size
    if width * height > max_megapixels * 1e6:
        raise BadImageError(path, f"has {width} x {height} pixels, above data.max_megapixels={max_megapixels:g}")
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise BadImageError(path, f"has {width} x {height} pixels, more than {_MAX_ASPECT:g} to 1")
    return EncodedImage(path, data, header)


def _other_header(path: str, data: bytes) -> Header:
    """The header of a format that only Pillow decodes, unless the file's name claims another format."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            (width, height), kind = image.size, image.format
    except Exception as error:  # whatever a parser raises for a damaged file
        raise BadImageError(path, "is not an image") from error
    if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES:
        raise BadImageError(path, f"is a {kind} file, which is not among JPEG, PNG, WebP and BMP")
    return Header("other", width, height)


def check_whole(image: EncodedImage) -> None:
    """Check that a file has an end marker, if its format has one; without it, decoding decides.

    Raises:
        BadImageError: the file is truncated.
    """
    if not image.header.whole:
        try:
            decode_rgb(image)
        except BadImageError as error:
            reason = f"is truncated ({len(image.data)} bytes, no end marker)"
            raise BadImageError(image.path, reason) from error


def decode_rgb(image: EncodedImage) -> Image.Image:
    """Upright RGB by Pillow: the first frame, with transparency dropped and 16 bits reduced to 8.

    Pillow gets the bytes without metadata and does not rotate anything: the header decides. (Formats that only Pillow
    decodes are left to it entirely.)

    Raises:
        BadImageError: it cannot be decoded.
    """
    header = image.header
    try:
        bare = image.data if header.format == "other" else plain(image.data, header)
        with Image.open(io.BytesIO(bare)) as opened:
            pixels: Image.Image = opened
            if opened.mode.startswith("I"):  # 16-bit grayscale: keep the high byte, as decoders do
                pixels = opened.point(lambda value: value / 256).convert("L")
            pixels = pixels.convert("RGB")
        if pixels.size != (header.width, header.height):
            raise ValueError(f"{pixels.width} x {pixels.height} pixels, not {header.width} x {header.height}")
    except Exception as error:  # whatever a decoder raises for a damaged file
        raise BadImageError(image.path, f"cannot be decoded ({error or type(error).__name__})") from error
    return pixels.transpose(_UPRIGHT[header.orientation]) if header.orientation > 1 else pixels


def recoded(image: EncodedImage) -> EncodedImage:
    """The same pixels in a format that every decoder reads.

    Raises:
        BadImageError: it cannot be decoded.
    """
    pixels = decode_rgb(image)
    buffer = io.BytesIO()
    pixels.save(buffer, "BMP")
    return EncodedImage(image.path, buffer.getvalue(), Header("BMP", *pixels.size))


def open_rgb(path: str) -> Image.Image:
    """One image as upright RGB, by Pillow.

    Raises:
        BadImageError: it cannot be read or decoded.
    """
    return decode_rgb(read_image(path, float("inf")))


def image_size(path: str, max_megapixels: float = MAX_MEGAPIXELS) -> tuple[int, int]:
    """(width, height) of an upright image, after cheap checks of the file.

    Raises:
        BadImageError: it cannot be used; see :func:`read_image`.
    """
    image = read_image(path, max_megapixels)
    check_whole(image)
    return image.header.size


def verify_files(
    paths: Iterable[str],
    *,
    decode: bool = False,
    workers: int = 0,
    max_megapixels: float = MAX_MEGAPIXELS,
    timeout: float = READ_TIMEOUT,
    progress: Callable[[int], None] | None = None,
) -> list[BadFile]:
    """Check every file in parallel: existence, size, header, end marker, and pixels with ``decode``.

    Args:
        paths: files to check.
        decode: also decode each image (slower; finds damaged pixels).
        workers: threads; 0 derives the number from the machine.
        max_megapixels: larger images count as bad, megapixels.
        timeout: seconds that one file may take.
        progress: called with 1 after each file.

    Returns:
        The bad files, in the given order.
    """

    def check(path: str) -> None:
        image = read_image(path, max_megapixels)
        check_whole(image)
        if decode:
            decode_rgb(image)

    bad = []
    pool: ReaderPool | None = None
    for some in _batches(paths, _VERIFIED_AT_ONCE):
        if pool is None:
            pool = ReaderPool(workers or max(readers_for(some), os.cpu_count() or 1), timeout)
        for path, found in zip(some, pool.read(check, some).results(), strict=True):
            if isinstance(found, Exception):
                bad.append(BadFile(path, reason_of(found)))
            if progress is not None:
                progress(1)
    if pool is not None:
        pool.close()
    return bad


def reason_of(error: Exception) -> str:
    """Why a file is bad, given the exception that was raised while it was read."""
    if isinstance(error, BadImageError):
        return error.reason
    return f"cannot be read ({error or type(error).__name__})"


def _batches(paths: Iterable[str], count: int) -> Iterator[list[str]]:
    source = iter(paths)
    return iter(lambda: list(islice(source, count)), [])
