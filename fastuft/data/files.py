"""Finding image files, and telling unusable ones before a decoder sees them."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import Image, ImageOps

from fastuft.atomic import write_whole
from fastuft.names import printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_SCAN_CACHE_FROM = 20_000  # smaller folders are scanned anew each time
_ORIENTATION = 0x0112  # EXIF tag
_MAX_ASPECT = 100.0
_WORKERS = min(32, 4 * (os.cpu_count() or 1))  # threads that wait for the file system
_TAIL = 65536  # bytes at the end in which an end marker is looked for

# ``max_megapixels`` says how large images may be; Pillow's own warning would only be in the way.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be used, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


class BadImageError(ValueError):
    """An image file that cannot be used; the message names it, the reason and the remedy.

    Args:
        path: the file.
        reason: what is wrong with it.
        skippable: whether the stream at hand can leave bad files out.
    """

    def __init__(self, path: str, reason: str, *, skippable: bool = False) -> None:
        remedy = "Remove or replace the file (`fastuft verify-data` lists all bad ones)"
        super().__init__(
            f"{printable(path)}: {reason}. {remedy}{', or set data.on_bad_file=skip' if skippable else ''}"
        )
        self.path = path
        self.reason = reason


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, *, chunk: int = 256
) -> Iterator[Result]:
    """``map(function, items)`` by several threads, in order; a chunk is one task, so that millions of items fit."""
    source = iter(items)

    def on_chunk(some: list[Item]) -> list[Result]:
        return [function(item) for item in some]

    with ThreadPoolExecutor(workers) as pool:
        for results in pool.map(on_chunk, iter(lambda: list(islice(source, chunk)), [])):
            yield from results


def _scan_folder(root: str) -> tuple[list[str], dict[str, int]]:
    """Image files below ``root`` and the modification time of each folder; folders are read by several threads.

    Hidden entries are left out. Links are followed, a folder that is reached by several links is read once.
    """
    files: list[str] = []
    folders: dict[str, int] = {}

    def read(folder: str) -> tuple[list[str], list[str], int]:
        inner, found = [], []
        modified = os.stat(folder).st_mtime_ns  # before reading: a file that comes meanwhile makes it out of date
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    inner.append(entry.path)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    found.append(entry.path)
        return inner, found, modified

    seen = {os.path.realpath(root)}
    level = [root]
    while level:
        following: list[str] = []
        for folder, (inner, found, modified) in zip(level, in_threads(read, level, _WORKERS, chunk=8), strict=True):
            files += found
            folders[folder] = modified
            for candidate in sorted(inner):
                real = os.path.realpath(candidate) if os.path.islink(candidate) else candidate
                if real not in seen:
                    seen.add(real)
                    following.append(candidate)
        level = following
    return sorted(files), folders


def _scan_cached(root: str) -> list[str]:
    """As ``_scan_folder``; a large tree is scanned again only when one of its folders has changed."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastuft"
    place = base / f"scan-{hashlib.blake2b(os.fsencode(root), digest_size=12).hexdigest()}.json"
    try:
        known = json.loads(place.read_text())
        if known["root"] == root and all(os.stat(f).st_mtime_ns == m for f, m in known["folders"].items()):
            return [str(file) for file in known["files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no cache, an unreadable one, or a folder that is gone: scan
    files, folders = _scan_folder(root)
    if len(files) >= _SCAN_CACHE_FROM:
        try:
            base.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"root": root, "folders": folders, "files": files}).encode()
            write_whole(place, content, flush=False)
        except OSError:
            pass  # the cache only saves time
    return files


def list_images(paths: str | Sequence[str]) -> list[str]:
    """All image files of folders (any depth), list files (``.txt``, a path a line, relative to it) and single files.

    Args:
        paths: one or several of them. Duplicates are kept once.

    Returns:
        Absolute paths, sorted within each root.

    Raises:
        ValueError: a path that does not exist, or a root without images (suffixes .jpg .jpeg .png .bmp .webp).
    """
    found: dict[str, None] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        root = os.path.abspath(os.path.expanduser(path))
        if os.path.isdir(root):
            files = _scan_cached(root)
        elif root.lower().endswith(".txt") and os.path.isfile(root):
            lines = (line.strip() for line in os.fsdecode(Path(root).read_bytes()).split("\n"))
            files = [os.path.join(os.path.dirname(root), line) for line in lines if line and not line.startswith("#")]
        elif os.path.isfile(root):
            files = [root]
        else:
            raise ValueError(f"{path!r} does not exist; name a folder of images, an image, or a list file (.txt)")
        if not files:
            raise ValueError(
                f"{path!r} holds no images; expected files ending in {' '.join(IMAGE_SUFFIXES)} at any depth"
            )
        found.update(dict.fromkeys(files))
    return list(found)


def labeled_folder(path: str) -> tuple[list[str], list[int], list[str]]:
    """Images of class sub-folders.

    Returns:
        (paths, labels, class names): classes are the sub-folders in sorted order, images of a class at any depth.

    Raises:
        ValueError: no class sub-folders, or one without images.
    """
    root = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(root):
        raise ValueError(f"{path!r} is not a folder; labels need one sub-folder a class")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{path!r} has no class sub-folders; labels need one sub-folder a class")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        files = list_images(os.path.join(root, name))
        paths += files
        labels += [label] * len(files)
    return paths, labels, names


def image_size(path: str, max_megapixels: float = 180.0) -> tuple[int, int]:
    """(width, height) of an upright image, read from its header, after cheap checks of the file.

    Raises:
        BadImageError: missing, empty, not an image whatever its name says, cut off, larger than ``max_megapixels``, or
            of an extreme aspect.
    """
    try:
        with open(path, "rb") as file:
            bytes_on_disk = os.fstat(file.fileno()).st_size
            if bytes_on_disk == 0:
                raise BadImageError(path, "is empty")
            head = file.read(12)
            # Some writers leave out the last padding byte.
            if head[8:] == b"WEBP" and int.from_bytes(head[4:8], "little") + 8 > bytes_on_disk + 1:
                raise BadImageError(path, f"is cut off ({bytes_on_disk} bytes, fewer than it declares)")
            file.seek(0)
            try:
                with Image.open(file) as image:
                    width, height = image.size
                    kind = image.format
                    exif = image.info.get("exif", b"")
            except Image.DecompressionBombError as error:
                raise BadImageError(path, "is larger than the image library opens at all") from error
            except (OSError, SyntaxError, ValueError) as error:
                reason = "holds no image" if isinstance(error, OSError) else f"has a damaged header ({error})"
                raise BadImageError(path, reason) from error
            if kind not in ("JPEG", "MPO", "PNG", "BMP", "DIB", "WEBP"):
                raise BadImageError(path, f"is a {kind} file, which is not among JPEG, PNG, WebP and BMP")
            if width * height > max_megapixels * 1e6:
                raise BadImageError(
                    path, f"has {width} x {height} pixels, above data.max_megapixels={max_megapixels:g}"
                )
            if max(width, height) > _MAX_ASPECT * min(width, height):
                raise BadImageError(path, f"has {width} x {height} pixels, more than {_MAX_ASPECT:g} to 1")
            whole = _has_end(file, bytes_on_disk, kind, len(exif))
    except OSError as error:
        raise BadImageError(path, f"cannot be read ({error.strerror or error})") from error
    if not whole:
        # Telephones append films of any length behind the end marker, so only decoding tells.
        try:
            open_rgb(path)
        except BadImageError as error:
            raise BadImageError(path, f"is cut off ({bytes_on_disk} bytes, no end marker)") from error
    return (height, width) if _is_turned(exif) else (width, height)


def _has_end(file: BinaryIO, size: int, kind: str, exif_bytes: int) -> bool:
    """Whether the end marker of a JPEG or PNG is there; writers may append bytes behind it."""
    if kind not in ("JPEG", "MPO", "PNG"):
        return True  # the others have none
    start = max(0, size - _TAIL)
    file.seek(start)
    position = start + file.read().rfind(b"IEND" if kind == "PNG" else b"\xff\xd9")
    # Metadata may hold a whole thumbnail, end marker and all; tables of a few hundred bytes follow them.
    return position > max(start - 1, exif_bytes + 100 if exif_bytes else 0)


def _is_turned(exif: bytes) -> bool:
    """Whether metadata say that width and height are swapped."""
    if not exif:
        return False
    tags = Image.Exif()
    try:
        tags.load(exif)
    except (OSError, SyntaxError, ValueError, KeyError):
        return False  # damaged metadata does not make the pixels unusable
    return tags.get(_ORIENTATION) in (5, 6, 7, 8)


def open_rgb(path: str) -> Image.Image:
    """One image as upright RGB: the first frame, transparency dropped, 16 bits cut to 8.

    Raises:
        BadImageError: it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            pixels: Image.Image = image
            if image.mode.startswith("I"):  # 16-bit grayscale: keep the high byte, as decoders do
                pixels = image.point(lambda value: value / 256).convert("L")
            return ImageOps.exif_transpose(pixels).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImageError(path, f"cannot be decoded ({error})") from error


def verify_files(
    paths: Iterable[str],
    *,
    decode: bool = False,
    workers: int = 0,
    max_megapixels: float = 180.0,
    progress: Callable[[int], None] | None = None,
) -> list[BadFile]:
    """Check every file in parallel: existence, size, header, end marker, and pixels with ``decode``.

    Args:
        paths: files to check.
        decode: also decode each image (slower, finds damage inside).
        workers: threads; 0 derives it from the machine.
        max_megapixels: larger images count as bad.
        progress: called with 1 for each file that is done.

    Returns:
        The bad files, in the order given.
    """

    def check(path: str) -> BadFile | None:
        try:
            image_size(path, max_megapixels)
            if decode:
                open_rgb(path)
        except BadImageError as error:
            return BadFile(path, error.reason)
        return None

    bad = []
    for result in in_threads(check, paths, workers or _WORKERS, chunk=16):
        if result is not None:
            bad.append(result)
        if progress is not None:
            progress(1)
    return bad


def write_bad_list(path: str | Path, bad: Sequence[BadFile]) -> None:
    """Write bad files as lines of path, tab, reason."""
    write_whole(Path(path), b"".join(os.fsencode(f"{entry.path}\t{entry.reason}\n") for entry in bad))
