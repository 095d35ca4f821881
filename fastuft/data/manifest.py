"""The training set of a run: all target images and the fixed random share of the source (sparse data replaying)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from fastuft.atomic import remove_leftovers, whole_file, write_whole
from fastuft.data.bad import BadImageError
from fastuft.data.listing import IMAGE_SUFFIXES, find_images
from fastuft.data.reading import in_threads, read_bytes
from fastuft.names import printable
from fastuft.randomness import keyed_generator

_READERS = 16  # threads that copy or look up files


@dataclass(frozen=True)
class Manifest:
    """Target images followed by the replayed source images.

    Args:
        paths: all files, target first.
        num_target: how many of them are target.
        source_total: images of the whole source set.
        fraction: share of the source that was drawn.
        seed: seed of the draw.
        content_hash: digest of every file's name, relative to the folder or list that it was found by, and size: the same
            for the same data under another root, behind a link, or read from a replay cache.
    """

    paths: tuple[str, ...]
    num_target: int
    source_total: int
    fraction: float
    seed: int
    content_hash: str

    @classmethod
    def build(
        cls,
        target: str | Sequence[str],
        source: str | Sequence[str] | None = None,
        *,
        fraction: float | None = 0.1,
        seed: int = 0,
        replay_cache: str | None = None,
        suffixes: Sequence[str] = IMAGE_SUFFIXES,
    ) -> Manifest:
        """Scan the folders and draw the replayed share, once and for all of a run.

        Args:
            target: folder, list file or several.
            source: the same; None trains on the target alone. Files that are target images too are left out of it.
            fraction: share of the source that joins, at least one image; None takes as many as there are target images,
                or all.
            seed: seed of the draw.
            replay_cache: folder to copy the drawn images to; training then reads the copies.
            suffixes: of image files in folders.

        Raises:
            ValueError: an empty or missing folder, a source that holds target images only, or a fraction out of [0, 1].
        """
        if fraction is not None and not 0 <= fraction <= 1:
            raise ValueError(f"data.replay_fraction={fraction!r} is out of range; allowed: [0, 1]")
        found = find_images(target, suffixes)
        targets, names = found.paths, [f"target/{name}" for name in found.names]
        drawn: list[str] = []
        total = 0
        if source:
            known = set(_real_paths(targets))
            found = find_images(source, suffixes)
            left = [row for row, real in enumerate(_real_paths(found.paths)) if real not in known]
            if not left:
                raise ValueError(f"source={source!r} holds target images only; name the images of pretraining, or none")
            total = len(left)
            fraction = min(1.0, len(targets) / total) if fraction is None else fraction
            count = max(1, round(fraction * total)) if fraction else 0
            chosen = keyed_generator(seed, "replay").permutation(total)[:count]
            rows = [left[index] for index in np.sort(chosen)]
            drawn = [found.paths[row] for row in rows]
            names += [f"source/{found.names[row]}" for row in rows]
            if replay_cache is not None:
                drawn = copy_to_cache(drawn, replay_cache)
        paths = (*targets, *drawn)
        share = fraction if source and fraction is not None else 0.0
        return cls(paths, len(targets), total, share, seed, _digest(paths, names))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_source(self) -> int:
        """Replayed source images."""
        return len(self.paths) - self.num_target

    @property
    def is_source(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """bool [len]: which images are replayed source."""
        return np.arange(len(self.paths)) >= self.num_target

    def summary(self) -> dict[str, Any]:
        """Counts, seed and digest, for the run's record."""
        return {
            "num_target": self.num_target,
            "num_source": self.num_source,
            "source_total": self.source_total,
            "fraction": self.fraction,
            "seed": self.seed,
            "content_hash": self.content_hash,
        }

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_whole(Path(path), json.dumps({**self.summary(), "paths": self.paths}).encode())


def _real_paths(paths: Sequence[str]) -> list[str]:
    """The paths with links to folders resolved; each folder is looked up once."""
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
    return [os.path.join(folders[os.path.dirname(path)], os.path.basename(path)) for path in paths]


def _digest(paths: Sequence[str], names: Sequence[str]) -> str:
    def size(path: str) -> int:
        try:
            return os.path.getsize(path)
        except OSError:
            return -1  # a vanished file is the streams' affair, under data.on_bad_file

    digest = hashlib.blake2b(digest_size=16)
    for name, length in zip(names, in_threads(size, paths, _READERS), strict=True):
        digest.update(os.fsencode(f"{name}\t{length}\n"))
    return digest.hexdigest()


def copy_to_cache(paths: Sequence[str], folder: str) -> list[str]:
    """Copy files to a local folder once; a copy that was broken off goes on where it stopped.

    Each copy is read back and compared with what was read from the original, and only then noted in ``index.jsonl``
    with the original's size and time. A later call keeps noted copies whose originals have not changed.

    Returns:
        The copies' paths, in the order given; the originals' where those cannot be read.

    Raises:
        ValueError: a folder that cannot be written, or a copy that cannot be written or differs from its original.
    """
    place = Path(folder).expanduser().resolve()
    index_path = place / "index.jsonl"
    try:
        place.mkdir(parents=True, exist_ok=True)
        index_path.touch()
    except OSError as error:
        raise ValueError(
            f"data.replay_cache={folder!r} cannot be written ({error.strerror or error}); name a folder on a local disk, "
            "or none"
        ) from error
    lock = threading.Lock()
    # Of several ranks one copies, and the others find its copies.
    with FileLock(place / ".lock"), open(index_path, "a+", buffering=1, encoding="utf-8", errors="replace") as index:
        remove_leftovers(place)
        index.seek(0)
        lines = index.read().split("\n")
        if lines.pop():  # the last line was cut off
            index.write("\n")
        noted = _read_index(lines)

        def copy(path: str) -> str:
            name = hashlib.blake2b(os.fsencode(path), digest_size=12).hexdigest()
            target = place / (name + os.path.splitext(path)[1].lower())
            try:
                found = os.stat(path)
                state = [found.st_size, found.st_mtime_ns]
                if noted.get(target.name) == state and target.exists() and target.stat().st_size == found.st_size:
                    return str(target)
                content = read_bytes(path)
            except (OSError, BadImageError):
                return path  # an unreadable original is the streams' affair, under data.on_bad_file
            try:
                _write_compared(target, content)
            except OSError as error:
                raise ValueError(
                    f"data.replay_cache={folder!r}: {printable(path)} cannot be copied ({error.strerror or error}); free "
                    "space or mend the disk, and start again: what is copied stays"
                ) from error
            with lock:
                index.write(json.dumps([target.name, *state]) + "\n")
            return str(target)

        return list(in_threads(copy, paths, _READERS, chunk=8))


def _write_compared(target: Path, content: bytes) -> None:
    """Write a file that is whole or not there, and read it back."""
    with whole_file(target, flush=False) as partial:
        partial.write_bytes(content)
        if partial.read_bytes() != content:
            raise OSError(errno.EIO, "the copy differs from its original")


def _read_index(lines: Sequence[str]) -> dict[str, list[int]]:
    """Name -> [size, modification time] of finished copies; lines that were cut off are passed over."""
    noted: dict[str, list[int]] = {}
    for line in lines:
        try:
            name, size, modified = json.loads(line)
            noted[name] = [size, modified]
        except (ValueError, TypeError):
            continue
    return noted
