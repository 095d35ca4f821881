"""The training images of a run: the target, and a fixed random share of the source (sparse source data replaying)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from fastuft.atomic import remove_leftovers, whole_file
from fastuft.data.bad import BadImageError
from fastuft.data.files import Files
from fastuft.data.images import Images, size_and_version
from fastuft.data.left_out import IMAGE_SUFFIXES
from fastuft.data.listing import find_images
from fastuft.data.reading import in_threads, read_bytes, readers_for
from fastuft.names import printable
from fastuft.randomness import keyed_generator

_AT_ONCE = 1 << 14  # images whose names are held as text


@dataclass(frozen=True)
class Manifest:
    """Target images followed by the replayed source images.

    Args:
        paths: all images, target first: a tuple where all are files.
        num_target: how many of them are target.
        source_total: number of images in the whole source.
        fraction: share of the source that was drawn.
        seed: seed of the draw.
        content_hash: digest of every file's size, and of its name relative to the folder or list that it was found through;
            it is the same for the same data under another root, behind a link, or in a replay cache.
    """

    paths: Sequence[str]
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
        """Scan the folders and draw the replayed share, which is fixed for the whole run.

        Args:
            target: one or several folders, list files, shards or URLs.
            source: the same for the source; None trains on the target alone. Target images in it are left out.
            fraction: share of the source that joins, at least one image; None takes as many as there are target images,
                or all.
            seed: seed of the draw.
            replay_cache: folder to copy the drawn images to; training then reads the copies.
            suffixes: suffixes of image files in folders.

        Raises:
            ValueError: a location is missing or has no images, the source has only target images, or the fraction is not in
                [0, 1].
        """
        if fraction is not None and not 0 <= fraction <= 1:
            raise ValueError(f"data.replay_fraction={fraction!r} is out of range; allowed: [0, 1]")
        images = find_images(target, suffixes)
        num_target, total = len(images), 0
        digest = hashlib.blake2b(digest_size=16)
        _add(digest, "target", images, images.sizes())
        if source:
            found = find_images(source, suffixes)
            left = _others(found, images)
            if not len(left):
                raise ValueError(f"source={source!r} has only target images; name the images of pretraining, or none")
            total = len(left)
            fraction = min(1.0, num_target / total) if fraction is None else fraction
            count = max(1, round(fraction * total)) if fraction else 0
            chosen = keyed_generator(seed, "replay").permutation(total)[:count]
            drawn = found.take(left[np.sort(chosen)])
            copies = drawn if replay_cache is None else _copies(copy_to_cache(drawn, replay_cache), drawn)
            # Sizes are those of the originals, so that a cache does not change the digest.
            _add(digest, "source", drawn, (copies if drawn.only_files else drawn).sizes())
            images = images.followed_by(copies)
        paths = tuple(images) if images.only_files else images
        share = fraction if source and fraction is not None else 0.0
        return cls(paths, num_target, total, share, seed, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_source(self) -> int:
        """Replayed source images."""
        return len(self.paths) - self.num_target

    @property
    def is_source(self) -> NDArray[np.bool_]:
        """Which images are replayed source images, bool [len]."""
        return np.arange(len(self.paths)) >= self.num_target

    def summary(self) -> dict[str, object]:
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
        """Write as JSON, some paths at a time: there may be millions."""
        with whole_file(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self.summary())[:-1] + ', "paths": [')
            for start in range(0, len(self.paths), _AT_ONCE):
                some = json.dumps(list(self.paths[start : start + _AT_ONCE]))
                file.write(("" if start == 0 else ", ") + some[1:-1])
            file.write("]}")


def _others(source: Images, target: Images) -> np.ndarray:
    """Positions of the source's images that are not among the target's; links to folders are resolved."""
    files = [any(each.plain for each in images.sources) for images in (source, target)]
    held = [frozenset[str]().union(*(each.containers() for each in images.sources)) for images in (source, target)]
    if not all(files) and held[0].isdisjoint(held[1]):
        return np.arange(len(source))
    known = set(_real_paths(target))
    return np.array([row for row, real in enumerate(_real_paths(source)) if real not in known], np.int64)


def _real_paths(paths: Sequence[str]) -> list[str]:
    """The paths with links to folders resolved; each folder is looked up once."""
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
    return [os.path.join(folders[os.path.dirname(path)], os.path.basename(path)) for path in paths]


def _copies(paths: Sequence[str], originals: Images) -> Images:
    return Images.of([Files(paths, list(originals.names()))])


def _add(digest: hashlib.blake2b, role: str, images: Images, sizes: np.ndarray) -> None:
    """Add names and sizes to the digest, some at a time: there may be millions."""
    for start in range(0, len(images), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        lines = zip(images[part].names(), sizes[part].tolist(), strict=True)
        digest.update(os.fsencode("".join([f"{role}/{name}\t{length}\n" for name, length in lines])))


def copy_to_cache(paths: Sequence[str], folder: str) -> list[str]:
    """Copy files to a local folder once; an interrupted copy continues where it stopped.

    Each copy is read back and compared with the bytes of the original, and only then recorded in ``index.jsonl`` with the
    original's size and modification time. A later call keeps recorded copies whose originals have not changed.

    Returns:
        The paths of the copies, in the given order; the path of the original if it cannot be read.

    Raises:
        ValueError: the folder or a copy cannot be written, or a copy differs from its original.
    """
    cache = Path(folder).expanduser().resolve()
    index_path = cache / "index.jsonl"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        index_path.touch()
    except OSError as error:
        raise ValueError(
            f"data.replay_cache={folder!r} cannot be written ({error.strerror or error}); name a folder on a local disk, "
            "or none"
        ) from error
    lock = threading.Lock()
    # One of several ranks copies, and the others find its copies.
    with FileLock(cache / ".lock"), open(index_path, "a+", buffering=1, encoding="utf-8", errors="replace") as index:
        remove_leftovers(cache)
        index.seek(0)
        lines = index.read().split("\n")
        if lines.pop():  # the last line is truncated
            index.write("\n")
        recorded = _read_index(lines)

        def copy(path: str) -> str:
            name = hashlib.blake2b(os.fsencode(path), digest_size=12).hexdigest()
            target = cache / (name + os.path.splitext(path)[1].lower())
            try:
                version = list(size_and_version(path))
                length, *recorded_version = recorded.get(target.name, [-1])
                if recorded_version == version and target.exists() and target.stat().st_size == length:
                    return str(target)
                content = read_bytes(path)
            except (OSError, BadImageError):
                return path  # the streams handle an unreadable original, according to data.on_bad_file
            try:
                _write_compared(target, content)
            except OSError as error:
                raise ValueError(
                    f"data.replay_cache={folder!r}: {printable(path)} cannot be copied ({error.strerror or error}); free "
                    "some disk space or repair the disk, and start again: finished copies are kept"
                ) from error
            with lock:
                index.write(json.dumps([target.name, len(content), *version]) + "\n")
            return str(target)

        return list(in_threads(copy, paths, readers_for(paths), chunk=8))


def _write_compared(target: Path, content: bytes) -> None:
    """Write a file whole or not at all, and read it back."""
    with whole_file(target, flush=False) as partial:
        partial.write_bytes(content)
        if partial.read_bytes() != content:
            raise OSError(errno.EIO, "the copy differs from its original")


def _read_index(lines: Sequence[str]) -> dict[str, list[int]]:
    """Name -> [size, size and version of the original] of finished copies; truncated lines are skipped."""
    recorded: dict[str, list[int]] = {}
    for line in lines:
        try:
            name, *numbers = json.loads(line)
            length, size, version = numbers if len(numbers) == 3 else (numbers[0], *numbers)  # older: copy and original
            recorded[name] = [length, size, version]
        except (ValueError, TypeError, IndexError):
            continue
    return recorded
