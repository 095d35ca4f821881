"""From what the user names to sources of images."""

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
from fastuft.data.sources.blobs import Blob, BlobError, LocalBlob, say_bad
from fastuft.data.sources.braces import expand_braces, has_pattern
from fastuft.data.sources.objects import Objects
from fastuft.data.sources.shards import Shards
from fastuft.data.sources.tables import Tables
from fastuft.data.sources.urls import blobs_of, shown_url
from fastuft.names import printable

_SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # compressed ones are refused by name
_TABLE = ".parquet"
PACKED_SUFFIXES = (".tar", ".parquet")  # what a folder may hold in place of images
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass
class Place:
    """What was found at one place.

    Args:
        shown: the place as messages name it.
        sources: of its images.
        left_out: what else lies there.
        twice: whether some of it was taken already, for another place.
    """

    shown: str
    sources: list[ImageSource] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    twice: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.sources))


def is_place(text: str) -> bool:
    """Whether a text names something else than a folder, a list or an image: a URL, shards, or several names."""
    if _URL.match(text):
        return True
    if os.path.isdir(os.path.expanduser(text)):
        return False
    return _is_packed(text) or (not os.path.lexists(os.path.expanduser(text)) and ("{" in text or has_pattern(text)))


def open_place(text: str, suffixes: tuple[str, ...], seen: set[str]) -> Place:
    """The images of a URL, of shards, or of a folder that holds shards.

    Args:
        text: as the user wrote it.
        suffixes: of images.
        seen: shards that were taken already, which are passed over; those of this place join them.

    Raises:
        ValueError: nothing there, or something that cannot be used; the message names it.
    """
    if _URL.match(text) and not text.lower().startswith("file:"):
        return _open_url(text, suffixes, seen)
    place = _local_text(text)
    paths = [path for name in dict.fromkeys(expand_braces(place)) for path in _matching(name)]
    bad: list[tuple[str, str]] = []
    files: list[str] = []
    blobs: list[Blob] = []
    found = Place(text)
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


def _open_url(text: str, suffixes: tuple[str, ...], seen: set[str]) -> Place:
    """The objects of a URL; as in a folder, shards count where there are no images beside them, or they are named."""
    place, is_image = Place(shown_url(text)), image_names(suffixes)
    blobs = blobs_of(text, (*_SHARDS, _TABLE, *filter(None, suffixes)))
    shards = [blob for blob in blobs if _is_packed(blob.name)]
    objects = [blob for blob in blobs if not _is_packed(blob.name) and place.left_out.takes(blob.name, is_image)]
    if objects and shards and not _is_packed(place.shown):
        place.left_out.others.update(os.path.splitext(blob.name)[1].lower() for blob in shards)
        shards = []
    with_sources(place, shards, suffixes, seen)
    new = [blob for blob in objects if blob.shown not in seen]
    place.twice |= len(new) < len(objects)
    seen |= {blob.shown for blob in new}
    if new:
        place.sources.append(Objects(new))
    return place


def packed_in(folder: str) -> list[Blob]:
    """The shards in a folder of any depth, sorted by their paths; hidden ones are passed over."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(root, name) for name in files if _is_packed(name) and not name.startswith(".")]
    return [LocalBlob.look(path, os.path.relpath(path, folder)) for path in sorted(found)]


def with_sources(
    place: Place, blobs: Sequence[Blob], suffixes: tuple[str, ...], seen: set[str], files: Sequence[str] = ()
) -> Place:
    """The place with the sources of its objects, those of a kind together."""
    place.twice = any(blob.shown in seen for blob in blobs) or any(file in seen for file in files)
    blobs = [blob for blob in blobs if blob.shown not in seen]
    seen |= {blob.shown for blob in blobs}
    shards = _of_kind(blobs, _SHARDS)
    if shards:
        cache = cache_folder()
        source, left_out = Shards.open(shards, suffixes, None if cache is None else cache / "shards")
        place.sources.append(source)
        place.left_out.add(left_out)
    tables = _of_kind(blobs, (_TABLE,))
    if tables:
        place.sources.append(Tables(tables))
    files = [file for file in files if file not in seen]
    if files:
        seen |= set(files)
        base = os.path.commonpath([os.path.dirname(file) for file in files])
        place.sources.append(Files(files, [os.path.relpath(file, base) for file in files]))
    return place


def _of_kind(blobs: Iterable[Blob], endings: tuple[str, ...]) -> list[Blob]:
    return [blob for blob in blobs if blob.name.lower().endswith(endings)]


def _is_packed(name: str) -> bool:
    return name.lower().endswith((*_SHARDS, _TABLE))


def _local_text(text: str) -> str:
    if not text.lower().startswith("file:"):
        return os.path.abspath(os.path.expanduser(text))
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"'{printable(text)}' names the machine '{parts.netloc}'; write file:///PATH")
    return os.path.abspath(unquote(parts.path))


def _matching(name: str) -> list[str]:
    """The paths that a name stands for: itself where it is there, or has no pattern."""
    if os.path.lexists(name) or not has_pattern(name):
        return [name]
    found = sorted(glob.glob(name, recursive=True))
    if not found:
        raise ValueError(f"'{printable(name)}' matches no file; check the pattern, or name a folder")
    return found
