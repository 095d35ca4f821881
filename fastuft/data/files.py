"""Finding image files, and telling unusable ones before a decoder sees them."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_SCAN_CACHE_FROM = 20_000  # smaller folders are scanned anew each time
_ORIENTATION = 0x0112  # EXIF tag
_MAX_ASPECT = 100.0


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be used, and why."""

    path: str
    reason: str


class BadImageError(ValueError):
    """An image file that cannot be used; the message names it, the reason and the remedy."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"{path}: {reason}. Remove or replace the file (`fastuft verify-data` lists all bad ones), "
            "or set data.on_bad_file=skip"
        )
        self.path = path
        self.reason = reason


def _scan_folder(root: str) -> tuple[list[str], dict[str, int]]:
    """Image files below ``root`` and the modification time of each folder; folders are read by several threads."""
    files: list[str] = []
    folders: dict[str, int] = {}

    def read(folder: str) -> tuple[list[str], list[str], int]:
        inner, found = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(IMAGE_SUFFIXES):
                    found.append(entry.path)
                elif entry.is_dir():
                    inner.append(entry.path)
        return inner, found, os.stat(folder).st_mtime_ns

    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        level = [root]
        while level:
            following: list[str] = []
            for folder, (inner, found, modified) in zip(level, pool.map(read, level), strict=True):
                files += found
                folders[folder] = modified
                # A link to a folder above would be walked forever.
                following += [f for f in inner if not (os.path.islink(f) and root.startswith(os.path.realpath(f)))]
            level = following
    return sorted(files), folders


def _scan_cached(root: str) -> list[str]:
    """As ``_scan_folder``; a large tree is scanned again only when one of its folders has changed."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastuft"
    place = base / f"scan-{hashlib.blake2b(root.encode(), digest_size=12).hexdigest()}.json"
    try:
        known = json.loads(place.read_text())
        if known["root"] == root and all(os.stat(f).st_mtime_ns == m for f, m in known["folders"].items()):
            return known["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no cache, an unreadable one, or a folder that is gone: scan
    files, folders = _scan_folder(root)
    if len(files) >= _SCAN_CACHE_FROM:
        try:
            base.mkdir(parents=True, exist_ok=True)
            partial = place.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"root": root, "folders": folders, "files": files}))
            partial.replace(place)
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
            lines = (line.strip() for line in Path(root).read_text().splitlines())
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


def labelled_folder(path: str) -> tuple[list[str], list[int], list[str]]:
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


def _tail(path: str, size: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, size - length))
        return file.read()


def image_size(path: str, max_megapixels: float = 180.0) -> tuple[int, int]:
    """(width, height) of an upright image, read from its header, after cheap checks of the file.

    Raises:
        BadImageError: missing, empty, not an image whatever its name says, cut off, larger than ``max_megapixels``, or
            of an extreme aspect.
    """
    try:
        bytes_on_disk = os.path.getsize(path)
    except OSError as error:
        raise BadImageError(path, f"cannot be read ({error.strerror})") from error
    if bytes_on_disk == 0:
        raise BadImageError(path, "is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
                kind = image.format
                exif = image.info.get("exif")
    except Image.DecompressionBombError as error:
        raise BadImageError(path, "is larger than the image library opens at all") from error
    except (OSError, SyntaxError, ValueError) as error:
        reason = "holds no image" if isinstance(error, OSError) else f"has a damaged header ({error})"
        raise BadImageError(path, reason) from error
    if kind not in ("JPEG", "MPO", "PNG", "BMP", "DIB", "WEBP"):
        raise BadImageError(path, f"is a {kind} file, which is not among JPEG, PNG, WebP and BMP")
    if width * height > max_megapixels * 1e6:
        raise BadImageError(path, f"has {width} x {height} pixels, above data.max_megapixels={max_megapixels:g}")
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise BadImageError(path, f"has {width} x {height} pixels, more than {_MAX_ASPECT:g} to 1")
    # Writers may append bytes behind the end marker, so look for it near the end, not at it.
    if kind in ("JPEG", "MPO") and b"\xff\xd9" not in _tail(path, bytes_on_disk, 65536):
        raise BadImageError(path, "is cut off (no JPEG end marker)")
    if kind == "PNG" and b"IEND" not in _tail(path, bytes_on_disk, 65536):
        raise BadImageError(path, "is cut off (no PNG end chunk)")
    if kind == "WEBP":
        with open(path, "rb") as file:
            declared = int.from_bytes(file.read(8)[4:8], "little") + 8
        if declared > bytes_on_disk + 1:
            raise BadImageError(path, f"is cut off ({bytes_on_disk} of {declared} bytes)")
    if exif:
        tags = Image.Exif()
        try:
            tags.load(exif)
            if tags.get(_ORIENTATION) in (5, 6, 7, 8):
                width, height = height, width
        except (OSError, SyntaxError, ValueError, KeyError):
            pass  # damaged metadata does not make the pixels unusable
    return width, height


def open_rgb(path: str) -> Image.Image:
    """One image as upright RGB; BadImageError names a file that cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                pixels: Image.Image = image
                if image.mode.startswith("I"):  # 16-bit greyscale: keep the high byte, as decoders do
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
        workers: threads; 0 takes four a processor.
        max_megapixels: larger images count as bad.
        progress: called with 1 for each file that is done.

    Returns:
        The bad files, in the order given.
    """

    def check(path: str) -> BadFile | None:
        bad = None
        try:
            image_size(path, max_megapixels)
            if decode:
                open_rgb(path)
        except BadImageError as error:
            bad = BadFile(path, error.reason)
        return bad

    bad = []
    with ThreadPoolExecutor(workers or 4 * (os.cpu_count() or 1)) as pool:
        for result in pool.map(check, paths, chunksize=64):
            if result is not None:
                bad.append(result)
            if progress is not None:
                progress(1)
    return bad


def write_bad_list(path: str | Path, bad: Sequence[BadFile]) -> None:
    """Write bad files as lines of path, tab, reason."""
    Path(path).write_text("".join(f"{entry.path}\t{entry.reason}\n" for entry in bad))
