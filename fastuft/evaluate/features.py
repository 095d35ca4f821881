"""A backbone's features of a stream of images, with a cache keyed by content."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fastuft.atomic import write_whole
from fastuft.data import read_bytes
from fastuft.device import Precision, autocast
from fastuft.evaluate.images import random_views
from fastuft.model import Backbone


def module_device(module: nn.Module) -> torch.device:
    """The device of a module's first parameter."""
    return next(module.parameters()).device


@contextmanager
def at_work(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Put the modules on ``device`` in eval mode; afterwards, restore their devices and modes."""
    homes = [(module, module_device(module)) for module in modules]
    states = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.to(device).eval()
    try:
        yield
    finally:
        for module, home in homes:
            module.to(home)
        for part, training in states:  # each part its own: some may be in eval mode while others train
            part.training = training


@torch.no_grad()
def features_of_views(
    backbone: Backbone,
    images: Sequence[Tensor],
    views: int,
    *,
    generator: np.random.Generator,
    size: int,
    scale: tuple[float, float],
    flip_p: float,
    batch_size: int,
    device: torch.device,
    precision: Precision = "auto",
) -> list[Tensor]:
    """Features [N, F] of several random crops of each image, on the CPU; the backbone's mode is not changed.

    Args:
        backbone: the network, on ``device``.
        images: uint8 [3, H, W] each.
        views: crops of each image.
        generator: generator of crops and flips; equal generators give every backbone the same views.
        size: side of the crops, pixels.
        scale: area range of the crops; (1, 1) takes the largest centered square.
        flip_p: probability of the horizontal flip.
        batch_size: images per forward pass.
        device: the device to compute on.
        precision: auto (bf16 on a GPU), bf16 or fp32.
    """
    found: list[list[Tensor]] = [[] for _ in range(views)]
    for start in range(0, len(images), batch_size):
        part = [image.to(device) for image in images[start : start + batch_size]]
        for features in found:
            batch = random_views(
                part, size, generator, scale=scale, flip_p=flip_p, mean=backbone.mean, std=backbone.std
            )
            with autocast(device, precision):
                features.append(backbone(batch).float().cpu())
    return [torch.cat(features) for features in found]


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    stream: Iterable[tuple[Tensor, Tensor | None]],
    device: torch.device | str | None = None,
    *,
    precision: Precision = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Features of every image of a stream, in order; the backbone runs in eval mode and is then restored.

    Args:
        backbone: [B, 3, H, W] -> [B, F].
        stream: yields (images, labels or None), as :class:`fastuft.data.EvalStream` does.
        device: the device to run on; None takes that of the backbone.
        precision: auto (bf16 on a GPU), bf16 or fp32.

    Returns:
        features [N, F] float32 and labels [N] int64 (None when the stream has none), both on the CPU.

    Raises:
        ValueError: the stream yields no image.
    """
    where = torch.device(device) if device is not None else module_device(backbone)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    with at_work([backbone], where):
        for images, target in stream:
            with autocast(where, precision):
                out = backbone(images.to(where, non_blocking=True))
            features.append(out.float().cpu())
            if target is not None:
                labels.append(target.cpu())
    if not features:
        raise ValueError("the stream yielded no images, so there are no features to evaluate")
    return torch.cat(features), torch.cat(labels) if labels else None


def weights_hash(backbone: nn.Module) -> str:
    """Hash of a backbone's structure and all of its tensors."""
    digest = hashlib.blake2b(repr(backbone).encode(), digest_size=16)
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_hash(paths: Sequence[str]) -> str:
    """Hash of the contents of files, in order, without their names.

    Raises:
        BadImageError: a file cannot be read, or is not a regular file.
    """

    def one(path: str) -> bytes:
        return hashlib.blake2b(read_bytes(path), digest_size=16).digest()

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return hashlib.blake2b(b"".join(pool.map(one, paths)), digest_size=16).hexdigest()


def cached_features(
    backbone: nn.Module,
    stream: Iterable[tuple[Tensor, Tensor | None]],
    paths: Sequence[str],
    cache: Path | str | None,
    *,
    settings: str,
    device: torch.device | str | None = None,
    precision: Precision = "auto",
) -> Tensor:
    """Features [N, F] of the images at ``paths``, stored in the folder ``cache`` and read from there the next time.

    The key covers the weights, the bytes of every image in order, ``settings`` (such as the input size) and the precision,
    so a stale entry cannot be read. A damaged entry is computed again. If ``cache`` is None, nothing is stored. If an entry
    cannot be written, a warning says so and the features are returned nevertheless.
    """
    if cache is None:
        return extract_features(backbone, stream, device, precision=precision)[0]
    parts = (weights_hash(backbone), files_hash(paths), settings, precision)
    file = Path(cache) / f"{hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()}.safetensors"
    kept = _read_entry(file, len(paths))
    if kept is not None:
        return kept
    features, _ = extract_features(backbone, stream, device, precision=precision)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, save({"features": features, "digest": _digest(features)}))
    except OSError as error:
        warnings.warn(f"features could not be cached in {file}: {error.strerror}; free some disk space", stacklevel=2)
    return features


def _read_entry(file: Path, count: int) -> Tensor | None:
    """The features in a whole entry for ``count`` images, or None."""
    try:
        entry = load(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, ValueError):
        entry = {}
    features, digest = entry.get("features"), entry.get("digest")
    if features is None or digest is None or len(features) != count or not torch.equal(digest, _digest(features)):
        warnings.warn(f"the cached features in {file} are damaged; they are computed again", stacklevel=2)
        return None
    return features


def _digest(features: Tensor) -> Tensor:
    """Hash of the values, uint8 [16]."""
    values = features.contiguous().view(-1).view(torch.uint8).numpy().data
    return torch.frombuffer(bytearray(hashlib.blake2b(values, digest_size=16).digest()), dtype=torch.uint8)
