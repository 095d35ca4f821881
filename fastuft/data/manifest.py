"""The training set of a run: all target images and the fixed random share of the source (sparse data replaying)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastuft.data.files import list_images
from fastuft.randomness import keyed_generator


@dataclass(frozen=True)
class Manifest:
    """Target images followed by the replayed source images.

    Args:
        paths: all files, target first.
        num_target: how many of them are target.
        source_total: images of the whole source set.
        fraction: share of the source that was drawn.
        seed: seed of the draw.
        content_hash: digest of every file's path and size.
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
        fraction: float = 0.1,
        seed: int = 0,
        replay_cache: str | None = None,
    ) -> Manifest:
        """Scan the folders and draw the replayed share, once and for all of a run.

        Args:
            target: folder, list file or several.
            source: the same; None trains on the target alone.
            fraction: share of the source that joins, at least one image.
            seed: seed of the draw.
            replay_cache: folder to copy the drawn images to; training then reads the copies.

        Raises:
            ValueError: an empty or missing folder, or a fraction out of [0, 1].
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"data.replay_fraction={fraction!r} is out of range; allowed: [0, 1]")
        targets = list_images(target)
        drawn: list[str] = []
        total = 0
        if source:
            everything = list_images(source)
            total = len(everything)
            count = max(1, round(fraction * total)) if fraction else 0
            chosen = keyed_generator(seed, "replay").permutation(total)[:count]
            drawn = [everything[index] for index in np.sort(chosen)]
            if replay_cache is not None:
                drawn = copy_to_cache(drawn, replay_cache)
        paths = (*targets, *drawn)
        return cls(paths, len(targets), total, fraction if source else 0.0, seed, _digest(paths))

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
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps({**self.summary(), "paths": self.paths}))
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read what ``save`` wrote."""
        content = json.loads(Path(path).read_text())
        content.pop("num_source")
        return cls(**{**content, "paths": tuple(content["paths"])})


def _digest(paths: Sequence[str]) -> str:
    def size(path: str) -> int:
        try:
            return os.path.getsize(path)
        except OSError:
            return -1  # a vanished file is the streams' affair, under data.on_bad_file

    digest = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(16) as pool:
        for path, length in zip(paths, pool.map(size, paths, chunksize=256), strict=True):
            digest.update(f"{path}\t{length}\n".encode())
    return digest.hexdigest()


def copy_to_cache(paths: Sequence[str], folder: str) -> list[str]:
    """Copy files to a local folder once; complete copies of the same size are kept, so a broken-off copy goes on.

    Returns:
        The copies' paths, in the order given.

    Raises:
        ValueError: a copy that does not have its original's size afterwards.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)

    def copy(path: str) -> str:
        name = hashlib.blake2b(path.encode(), digest_size=12).hexdigest() + os.path.splitext(path)[1].lower()
        target = place / name
        size = os.path.getsize(path)
        if not (target.exists() and target.stat().st_size == size):
            partial = target.with_suffix(f"{target.suffix}.{os.getpid()}")
            shutil.copyfile(path, partial)
            if partial.stat().st_size != size:
                raise ValueError(f"data.replay_cache={folder!r}: the copy of {path} is incomplete; is the disk full?")
            partial.replace(target)
        return str(target.resolve())

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(copy, paths))
