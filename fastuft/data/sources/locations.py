"""Turn the locations that a user names into image sources."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from fastuft.data.caches import cache_folder
from fastuft.data.files import Files
from fastuft.data.images import ImageSource
from fastuft.data.left_out import LeftOut, image_names
from fastuft.data.sources.arrow import ArrowTables
from fastuft.data.sources.blobs import Blob, BlobError, LocalBlob, say_bad
from fastuft.data.sources.braces import expand_braces, has_pattern
from fastuft.data.sources.objects import Objects
from fastuft.data.sources.shards import Shards
from fastuft.data.sources.tables import Tables
from fastuft.data.sources.urls import blobs_of, shown_url
from fastuft.messages import note
from fastuft.names import printable

_SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # opening a compressed one is an error
_TABLES, _ARROW = (".parquet",), (".arrow",)
PACKED_SUFFIXES = (".tar", ".parquet", ".arrow")  # what a folder may hold instead of image files
_INTERMEDIATE = re.compile(r"cache-.*\.arrow")
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<total>\d{1,6})[^/]*?(?P<ending>\.\w+)")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass
class Found:
    """What one location holds.

    Args:
        shown: the location as it appears in messages.
        sources: its images.
        left_out: its other files and folders.
        twice: whether some of its images were already taken from another location.
    """

    shown: str
    sources: list[ImageSource] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    twice: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.sources))


def is_url_or_packed(text: str) -> bool:
    """Whether ``text`` is a URL, a shard, a table, or a pattern, rather than a folder, a list file or an image."""
    if _URL.match(text):
        return True
    if os.path.isdir(os.path.expanduser(text)):
        return False
    return _is_packed(text) or (not os.path.lexists(os.path.expanduser(text)) and ("{" in text or has_pattern(text)))


def open_location(text: str, suffixes: tuple[str, ...], seen: set[str]) -> Found:
    """The images at a URL, in shards, or in a folder of shards.

    Args:
        text: the location as the user wrote it.
        suffixes: suffixes of images.
        seen: objects that were already taken and are skipped; this location's are added.

    Raises:
        ValueError: there is nothing at the location, or something that cannot be used; the message names it.
    """
    if _URL.match(text) and not text.lower().startswith("file:"):
        return _open_url(text, suffixes, seen)
    names = dict.fromkeys(expand_braces(_local_path(text)))
    paths = [path for name in names for path in _matching(name)]
    bad: list[tuple[str, str]] = []
    files: list[str] = []
    blobs: list[Blob] = []
    found = Found(text)
    is_image = image_names(suffixes)
    for path in dict.fromkeys(paths):
        if os.path.isdir(path):
            blobs += packed_in(path)
        elif _is_packed(path):
            try:
                blobs.append(LocalBlob.look(path))
            except BlobError as error:
                bad.append((path, str(error)))
        elif not os.path.lexists(path):
            bad.append((path, "does not exist"))
        elif found.left_out.takes(os.path.basename(path), is_image):
            files.append(path)
    if bad:
        raise say_bad(bad, len(paths), "files")
    return with_sources(found, blobs, suffixes, seen, files)


def _open_url(text: str, suffixes: tuple[str, ...], seen: set[str]) -> Found:
    """The objects at a URL. As in a folder, shards beside image files are left out unless the URL names them."""
    found, is_image = Found(shown_url(text)), image_names(suffixes)
    blobs = blobs_of(text, (*_SHARDS, *_TABLES, *_ARROW, *filter(None, suffixes)))
    shards = [blob for blob in blobs if _is_packed(blob.name)]
    if not ("{" in text or has_pattern(text) or _is_packed(found.shown)):
        shards = _complete_sets(shards, found.shown)
    objects = [blob for blob in blobs if not _is_packed(blob.name) and found.left_out.takes(blob.name, is_image)]
    if objects and shards and not _is_packed(found.shown):
        found.left_out.others.update(os.path.splitext(blob.name)[1].lower() for blob in shards)
        shards = []
    with_sources(found, shards, suffixes, seen)
    new = [blob for blob in objects if blob.shown not in seen]
    found.twice |= len(new) < len(objects)
    seen |= {blob.shown for blob in new}
    if new:
        found.sources.append(Objects(new))
    return found


def packed_in(folder: str) -> list[Blob]:
    """The shards and tables in a folder at any depth, sorted by path; hidden ones are skipped.

    Raises:
        ValueError: some of a set of numbered files are missing.
    """
    paths: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(root, name) for name in files if _is_packed(name) and not name.startswith(".")]
    return _complete_sets([LocalBlob.look(path, os.path.relpath(path, folder)) for path in sorted(paths)], folder)


def _complete_sets(blobs: Sequence[Blob], location: str) -> list[Blob]:
    """The shards of a folder or prefix without the intermediate results that ``datasets`` caches.

    Raises:
        ValueError: some of a set of numbered files (``train-00003-of-00010``) are missing.
    """
    kept = [blob for blob in blobs if not _INTERMEDIATE.fullmatch(blob.name.rpartition("/")[2])]
    if len(kept) < len(blobs):
        number = len(blobs) - len(kept)
        note(f"'{printable(location)}': {number} files cache-*.arrow, intermediate results of datasets, are left out")
    sets: dict[tuple[str, str, str], set[int]] = {}
    for blob in kept:
        if match := _NUMBERED.fullmatch(blob.name):
            sets.setdefault((match["stem"], match["total"], match["ending"]), set()).add(int(match["number"]))
    for (stem, total, ending), numbers in sets.items():
        first = 0 if 0 in numbers or int(total) not in numbers else 1
        if missing := sorted(set(range(first, first + int(total))) - numbers):
            name = f"{stem}-{missing[0]:0{len(total)}d}-of-{total}{ending}"
            raise ValueError(
                f"'{printable(location)}' lacks {len(missing)} of {int(total)} numbered files, the first of them "
                f"{printable(name)}; copy the missing files, or name the files to use by a pattern, as in '*{ending}'"
            )
    return kept


def with_sources(
    found: Found, blobs: Sequence[Blob], suffixes: tuple[str, ...], seen: set[str], files: Sequence[str] = ()
) -> Found:
    """``found`` with the sources of its objects and files added: one source per kind."""
    found.twice = any(blob.shown in seen for blob in blobs) or any(file in seen for file in files)
    blobs = [blob for blob in blobs if blob.shown not in seen]
    seen |= {blob.shown for blob in blobs}
    for kind, endings in ((Shards, _SHARDS), (ArrowTables, _ARROW)):
        if shards := _of_kind(blobs, endings):
            cache = cache_folder()
            source, left_out = kind.open(shards, suffixes, None if cache is None else cache / "shards")
            found.sources.append(source)
            found.left_out.add(left_out)
    if tables := _of_kind(blobs, _TABLES):
        found.sources.append(Tables(tables))
    files = [file for file in files if file not in seen]
    if files:
        seen |= set(files)
        base = os.path.commonpath([os.path.dirname(file) for file in files])
        found.sources.append(Files(files, [os.path.relpath(file, base) for file in files]))
    return found


def _of_kind(blobs: Iterable[Blob], endings: tuple[str, ...]) -> list[Blob]:
    return [blob for blob in blobs if blob.name.lower().endswith(endings)]


def _is_packed(name: str) -> bool:
    return name.lower().endswith((*_SHARDS, *_TABLES, *_ARROW))


def _local_path(text: str) -> str:
    if not text.lower().startswith("file:"):
        return os.path.abspath(os.path.expanduser(text))
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"'{printable(text)}' names the host '{parts.netloc}'; write file:///PATH")
    return os.path.abspath(unquote(parts.path))


def _matching(name: str) -> list[str]:
    """The paths that match a name; a name that exists or has no pattern stands for itself."""
    if os.path.lexists(name) or not has_pattern(name):
        return [name]
    found = sorted(glob.glob(name, recursive=True))
    if not found:
        raise ValueError(f"'{printable(name)}' matches no file; check the pattern, or name a folder")
    return found
