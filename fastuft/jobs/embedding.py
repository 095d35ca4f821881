"""Features of images from any checkpoint, with the network's preprocessing, in parts that survive an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastuft.atomic import remove_leftovers, whole_file, write_whole
from fastuft.config import EmbedConfig
from fastuft.data import EvalStream, Loading, list_images, size_and_version, verify_files
from fastuft.device import choose_device
from fastuft.evaluate import extract_features, weights_hash
from fastuft.jobs.inputs import check_checkpoint
from fastuft.jobs.storage import Embeddings, check_out, write_embeddings
from fastuft.model import Backbone, open_backbone
from fastuft.names import printable

# The options stored with embeddings, so that a query is embedded in the same way.
_REMEMBERED = ("checkpoint", "arch", "stem", "init_key", "init_channels", "size", "resize")


@dataclass
class _Work:
    """A backbone and the images that it embeds."""

    backbone: Backbone
    config: EmbedConfig
    paths: Sequence[str]
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = choose_device(self.config.device)

    def settings(self) -> dict[str, object]:
        """The settings that features depend on, besides the images."""
        config, backbone = self.config, self.backbone
        chosen = {name: getattr(config, name) for name in _REMEMBERED} | {"arch": backbone.arch, "stem": backbone.stem}
        chosen |= {"checkpoint": os.path.abspath(config.checkpoint), "size": config.size or backbone.input_size}
        return {**chosen, "weights": weights_hash(backbone)}

    def key(self) -> str:
        """Hash of everything that features depend on; files count by name, size and modification time."""
        digest = hashlib.blake2b(json.dumps(self.settings(), sort_keys=True).encode(), digest_size=16)
        digest.update(f"{self.config.part_size} {self.config.precision} {self.device.type}".encode())
        if self.backbone.traits.pool != "own":
            digest.update(self.backbone.traits.pool.encode())
        for path in self.paths:
            size, version = size_and_version(path)
            digest.update(f"{path!r} {size} {version}".encode(errors="backslashreplace"))
        return digest.hexdigest()

    def features(self, paths: Sequence[str]) -> Tensor:
        """Features [n, D] float32 of some of the images, on the CPU."""
        config, backbone = self.config, self.backbone
        stream = EvalStream(
            paths,
            loading=Loading(backbone.mean, backbone.std, self.device, loader=config.loader, threads=config.threads),
            size=config.size or backbone.input_size,
            resize=config.resize,
            batch_size=config.batch_size,
        )
        try:
            return extract_features(backbone, stream, self.device, precision=config.precision)[0]
        finally:
            stream.close()


def embed_images(
    config: EmbedConfig,
    backbone: Backbone | None = None,
    *,
    keep: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Embeddings:
    """Features of every image, in the order of their names; the backbone runs in eval mode and is then restored.

    With ``keep``, they are written to ``config.out``. Meanwhile, parts of them are saved beside it in a folder whose name ends
    in ``.parts``: the same call continues after the last whole part, and starts again if images, weights or settings differ.

    Args:
        config: images, checkpoint and settings.
        backbone: used instead of ``config.checkpoint``.
        keep: whether to write the file, and parts along the way.
        progress: called after each part with (images done, total images).

    Raises:
        ValueError: there are no images, or a checkpoint or file cannot be read.
        OSError: a file could not be written.
    """
    if keep:
        check_out(config.out)
    if backbone is None:
        check_checkpoint("checkpoint", config.checkpoint)
        backbone, _ = open_backbone(
            config.checkpoint, config.arch, config.stem, key=config.init_key, channels=config.init_channels
        )
    backbone.check_size(config.size or backbone.input_size, "size")
    paths, bad = _usable(list_images(config.images, config.suffixes), config)
    work = _Work(backbone, config, paths)
    parts = _Parts(Path(f"{config.out}.parts"), work.key()) if keep else None
    done: list[np.ndarray] = []
    for start in range(0, len(paths), config.part_size):
        some = paths[start : start + config.part_size]
        found = None if parts is None else parts.read(len(done), len(some))
        if found is None:
            found = work.features(some).numpy()
            if parts is not None:
                parts.write(len(done), found)
        done.append(found)
        if progress is not None:
            progress(start + len(some), len(paths))
    embeddings = Embeddings(np.concatenate(done), tuple(map(str, paths)), work.settings(), bad)
    if parts is not None:
        write_embeddings(config.out, embeddings)
        parts.remove()
    return embeddings


def _usable(paths: Sequence[str], config: EmbedConfig) -> tuple[Sequence[str], dict[str, str]]:
    """(usable images, {name: reason} of the others)."""
    if config.on_bad_file == "error":
        return paths, {}
    bad = {entry.path: entry.reason for entry in verify_files(paths, decode=True)}
    left = [path for path in paths if path not in bad]
    if not left:
        path, reason = next(iter(bad.items()))
        raise ValueError(f"all {len(paths)} images are bad (first: {printable(path)}: {reason}); name other images")
    return left, {printable(path): reason for path, reason in bad.items()}


class _Parts:
    """Features of an unfinished list of images, one file per part, for one key at a time."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._key = folder, folder / "key.txt"
        try:
            same = self._key.read_text(encoding="utf-8") == key
        except (OSError, ValueError):
            same = False
        if not same:
            self.remove()
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        write_whole(self._key, key.encode())

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npy"

    def read(self, number: int, count: int) -> np.ndarray | None:
        """Features [count, D] of a part, or None if it does not exist or is not whole."""
        try:
            found = np.load(self._file(number), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        whole = isinstance(found, np.ndarray) and found.dtype == np.float32 and found.ndim == 2 and len(found) == count
        return found if whole else None

    def write(self, number: int, features: np.ndarray) -> None:
        with whole_file(self._file(number)) as partial, partial.open("wb") as file:
            np.save(file, features, allow_pickle=False)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
