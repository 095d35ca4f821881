"""Streams of views: training (two views a target or replayed image), labelled training, evaluation."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastuft.config import AugmentConfig, DataConfig
from fastuft.data.backend import Backend, DecodeError, Request, ViewSpec
from fastuft.data.files import BadFile, BadImageError, image_size
from fastuft.data.manifest import Manifest
from fastuft.data.order import epoch_order, source_rows, steps_in_epoch
from fastuft.data.views import centre_views, draw_views, uniforms
from fastuft.randomness import keyed_generator

Loader = Literal["auto", "dali", "torch"]
Triple = tuple[float, float, float]

_MANY_BAD = 0.5  # share of bad files at which skipping stops making sense
_said_missing = False


def resolve_loader(loader: Loader) -> Literal["dali", "torch"]:
    """dali or torch; ``auto`` takes DALI where it is installed and says so, once, where it is not.

    Raises:
        ValueError: dali asked for where it is missing.
    """
    global _said_missing
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if loader == "torch" or (loader == "auto" and not installed):
        if loader == "auto" and not _said_missing:
            print("DALI is not installed: images go through the slower PyTorch loader.", file=sys.stderr)
            _said_missing = True
        return "torch"
    if not installed:
        raise ValueError(
            "data.loader='dali' needs DALI; pip install nvidia-dali-cuda130 (or -cuda120), or set data.loader=torch"
        )
    return "dali"


def _make_backend(loader: Loader, spec: ViewSpec) -> Backend:
    if resolve_loader(loader) == "dali":
        from fastuft.data.dali import DaliBackend

        return DaliBackend(spec)
    from fastuft.data.torch_loader import TorchBackend

    return TorchBackend(spec)


def _undecodable(loader: Loader, paths: list[str]) -> list[tuple[str, str]]:
    if resolve_loader(loader) == "dali":
        from fastuft.data.dali import undecodable
    else:
        from fastuft.data.torch_loader import undecodable
    return undecodable(paths)


def _named(loader: Loader, results: Iterator[tuple[Request, list[Tensor]]]) -> Iterator[tuple[Request, list[Tensor]]]:
    """The results; a decoder's failure becomes an error that names the file."""
    try:
        yield from results
    except DecodeError as error:
        for path, reason in _undecodable(loader, error.paths):
            raise BadImageError(path, reason) from error
        raise


class _Files:
    """Files with their sizes, looked up once each, and the rule for bad ones."""

    def __init__(self, paths: Sequence[str], on_bad_file: str, max_megapixels: float, seed: int) -> None:
        self.paths = paths
        self.skip = on_bad_file == "skip"
        self.max_megapixels = max_megapixels
        self.seed = seed
        self.sizes = np.zeros((len(paths), 2), np.int32)
        self.bad: dict[int, str] = {}

    def mark(self, index: int, reason: str) -> None:
        """Record a bad file; without ``skip``, or when most files are bad, raise instead."""
        self.bad[index] = reason
        if not self.skip:
            raise BadImageError(self.paths[index], reason)
        if len(self.bad) > max(_MANY_BAD * len(self.paths), 1):
            raise ValueError(
                f"{len(self.bad)} of {len(self.paths)} files are bad, too many to skip (last: {self.paths[index]}: "
                f"{reason}); run `fastuft verify-data` on the folders"
            )

    def good(self, index: int) -> bool:
        """Whether a file passes the cheap checks; its size is known afterwards."""
        if index in self.bad:
            return False
        if not self.sizes[index, 0]:
            try:
                self.sizes[index] = image_size(self.paths[index], self.max_megapixels)
            except BadImageError as error:
                self.mark(index, error.reason)
                return False
        return True

    def usable(self, indices: np.ndarray, key: tuple[int, ...], positions: np.ndarray) -> np.ndarray:
        """The indices with bad files replaced by good ones, drawn by (seed, key, position)."""
        chosen = indices.copy()
        for row, index in enumerate(indices):
            if not self.good(int(index)):
                generator = keyed_generator(self.seed, "replacement", *key, int(positions[row]))
                replacement = int(generator.integers(len(self.paths)))
                while not self.good(replacement):
                    replacement = int(generator.integers(len(self.paths)))
                chosen[row] = replacement
        return chosen

    def listed(self) -> list[BadFile]:
        return [BadFile(self.paths[index], reason) for index, reason in sorted(self.bad.items())]


@dataclass(frozen=True)
class Batch:
    """One rank's share of a training step.

    Args:
        query: [b, 3, H, W] channels_last, normalised; the views of the query encoder.
        key: the same images' other views.
        index: int64 [b] on the CPU, positions in the manifest.
        is_source: bool [b] on the CPU, which are replayed source images.
        epoch: epoch, from 0.
        step: step within the epoch, from 0.
    """

    query: Tensor
    key: Tensor
    index: Tensor
    is_source: Tensor
    epoch: int
    step: int


class TrainStream:
    """Two augmented views of target and replayed source images.

    The order, the crops and every other random number are functions of (seed, epoch, global position, view): the same
    images and views come for any number of ranks, threads and restarts. Rank r takes rows [r b, (r + 1) b) of each
    global batch.

    Args:
        manifest: the training set.
        data: batch, replay mode, loader and bad-file rule.
        augment: strengths of the views.
        seed: the run's seed.
        rank: this process.
        world_size: processes.
        device: where the views are wanted; a CUDA device decodes there.
        dtype: of the views.
        mean: normalisation for pixels in [0, 1].
        std: likewise.

    Raises:
        ValueError: fewer images than a batch, or a batch that does not divide over the ranks.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        augment: AugmentConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        mean: Triple,
        std: Triple,
    ) -> None:
        if data.batch_size % world_size:
            raise ValueError(
                f"data.batch_size={data.batch_size} does not divide over {world_size} processes; "
                f"choose a multiple of {world_size}"
            )
        if not data.drop_last and world_size > 1:
            raise ValueError("data.drop_last=False works with one process only; set data.drop_last to true")
        self._order = {
            "num_target": manifest.num_target,
            "num_source": manifest.num_source,
            "batch": data.batch_size,
            "mode": data.replay_mode,
            "share": data.replay_share,
            "drop_last": data.drop_last,
        }
        self.steps_per_epoch = steps_in_epoch(**self._order)  # type: ignore[arg-type]
        if self.steps_per_epoch == 0:
            balanced = data.replay_mode == "balanced"
            have = manifest.num_target if balanced else len(manifest)
            need = data.batch_size - source_rows(data.batch_size, data.replay_share) if balanced else data.batch_size
            raise ValueError(
                f"data.batch_size={data.batch_size} needs {need} images for one step and there are {have}; "
                f"choose a smaller batch, or set data.drop_last to false"
            )
        self.manifest = manifest
        self.augment = augment
        self.seed = seed
        self.rank = rank
        self.batch_size = data.batch_size
        self.local_batch = data.batch_size // world_size
        self._loader = data.loader
        self._files = _Files(manifest.paths, data.on_bad_file, data.max_megapixels, seed)
        colour = augment.jitter_p > 0 or augment.greyscale_p > 0
        self._backend = _make_backend(
            data.loader,
            ViewSpec(
                size=augment.size,
                num_views=2,
                colour=colour,
                blur=augment.blur_p > 0,
                rotation=augment.rotation > 0,
                mean=mean,
                std=std,
                batch_size=self.local_batch,
                device=torch.device(device),
                dtype=dtype,
                threads=data.threads,
                prefetch=data.prefetch,
                hw_decoder_load=data.hw_decoder_load,
            ),
        )

    @property
    def bad_files(self) -> list[BadFile]:
        """Files skipped so far, with the reason."""
        return self._files.listed()

    def _request(self, order: np.ndarray, epoch: int, step: int) -> Request:
        first = step * self.batch_size + self.rank * self.local_batch
        positions = np.arange(first, min(first + self.local_batch, len(order)))
        index = self._files.usable(order[positions], (epoch,), positions)
        sizes = self._files.sizes[index]
        views = tuple(draw_views(self.augment, sizes, uniforms(self.seed, epoch, view, positions)) for view in range(2))
        return Request([self.manifest.paths[i] for i in index], views, (step, index))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of one epoch, from ``start_step`` on.

        Raises:
            BadImageError: a bad file under ``on_bad_file: error``; it names the file and the remedy.
        """
        order = epoch_order(**self._order, seed=self.seed, epoch=epoch)  # type: ignore[arg-type]
        is_source = self.manifest.is_source
        step = start_step
        while step < self.steps_per_epoch:
            requests = (self._request(order, epoch, s) for s in range(step, self.steps_per_epoch))
            try:
                for request, (query, key) in self._backend.run(requests):
                    step, index = request.tag
                    yield Batch(query, key, torch.from_numpy(index), torch.from_numpy(is_source[index]), epoch, step)
                    step += 1
            except DecodeError as error:
                self._mark_undecodable(error)

    def _mark_undecodable(self, error: DecodeError) -> None:
        """Find the files behind a decoder's failure; they are replaced when the batches are made again."""
        culprits = _undecodable(self._loader, error.paths)
        if not culprits:
            raise error  # not a file's fault
        for path, reason in culprits:
            self._files.mark(self.manifest.paths.index(path), reason)

    def prefill(self, count: int) -> Iterator[Tensor]:
        """Key views [b, 3, H, W] of ``count`` images, to fill the queue before training.

        The order and the views belong to epoch -1, so training draws none of them. More images than the manifest
        holds are taken from further passes (-2, -3, ...).
        """
        epoch = -1
        while count > 0:
            for batch in self.epoch(epoch):
                yield batch.key[: max(count, 0)]
                count -= self.batch_size
                if count <= 0:
                    break
            epoch -= 1

    def close(self) -> None:
        """Give back threads and memory."""
        self._backend.close()


class EvalStream:
    """Images in order: shorter side to ``resize``, centre crop of ``size``, normalised; the last partial batch is kept.

    Args:
        paths: files.
        labels: their labels, or None.
        size: side of the crop, pixels.
        resize: shorter side the crop is taken from; 0 means size * 256 / 224.
        batch_size: images a batch.
        device: where they are wanted.
        dtype: of the images.
        mean: normalisation for pixels in [0, 1].
        std: likewise.
        loader: auto, dali or torch.
        threads: decoding threads; 0 derives it.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | None = None,
        *,
        size: int,
        resize: int = 0,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        mean: Triple,
        std: Triple,
        loader: Loader = "auto",
        threads: int = 0,
    ) -> None:
        resize = resize or round(size * 256 / 224)
        if resize < size:
            raise ValueError(f"resize={resize} is smaller than size={size}; choose at least {size}, or 0")
        if labels is not None and len(labels) != len(paths):
            raise ValueError(f"labels has {len(labels)} entries for {len(paths)} images; give one a image")
        self.paths = list(paths)
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        self.size, self.resize, self.batch_size = size, resize, batch_size
        self._loader = loader
        self._files = _Files(self.paths, "error", 180.0, 0)
        self._backend = _make_backend(loader, _plain_spec(size, batch_size, device, dtype, mean, std, threads))

    def __len__(self) -> int:
        """Batches."""
        return -(-len(self.paths) // self.batch_size)

    def _requests(self) -> Iterator[Request]:
        for first in range(0, len(self.paths), self.batch_size):
            rows = np.arange(first, min(first + self.batch_size, len(self.paths)))
            for row in rows:
                self._files.good(int(row))
            views = (centre_views(self._files.sizes[rows], self.size, self.resize),)
            yield Request([self.paths[row] for row in rows], views, rows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(images [b, 3, size, size], labels int64 [b] or None)."""
        for request, (images,) in _named(self._loader, self._backend.run(self._requests())):
            yield images, None if self.labels is None else self.labels[request.tag]

    def close(self) -> None:
        """Give back threads and memory."""
        self._backend.close()


class LabelledTrainStream:
    """Random resized crops and flips of labelled images, for finetuning a classifier.

    Args:
        paths: files.
        labels: their labels.
        augment: crop and flip are taken from it; colour, blur and rotation as they stand there.
        batch_size: images a batch; the last partial batch is kept.
        seed: seed of order and views.
        device, dtype, mean, std, loader, threads: as for :class:`EvalStream`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        *,
        augment: AugmentConfig,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        mean: Triple,
        std: Triple,
        loader: Loader = "auto",
        threads: int = 0,
    ) -> None:
        self.paths = list(paths)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.augment, self.batch_size, self.seed = augment, batch_size, seed
        self._loader = loader
        self._files = _Files(self.paths, "error", 180.0, seed)
        spec = _plain_spec(augment.size, batch_size, device, dtype, mean, std, threads, augment)
        self._backend = _make_backend(loader, spec)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images [b, 3, size, size], labels int64 [b]) of one shuffled pass."""
        order = keyed_generator(self.seed, "order", epoch).permutation(len(self.paths))

        def requests() -> Iterator[Request]:
            for first in range(0, len(order), self.batch_size):
                positions = np.arange(first, min(first + self.batch_size, len(order)))
                rows = order[positions]
                for row in rows:
                    self._files.good(int(row))
                u = uniforms(self.seed, epoch, 0, positions)
                views = (draw_views(self.augment, self._files.sizes[rows], u),)
                yield Request([self.paths[row] for row in rows], views, rows)

        for request, (images,) in _named(self._loader, self._backend.run(requests())):
            yield images, self.labels[request.tag]

    def close(self) -> None:
        """Give back threads and memory."""
        self._backend.close()


def _plain_spec(
    size: int,
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    mean: Triple,
    std: Triple,
    threads: int,
    augment: AugmentConfig | None = None,
) -> ViewSpec:
    return ViewSpec(
        size=size,
        num_views=1,
        colour=augment is not None and (augment.jitter_p > 0 or augment.greyscale_p > 0),
        blur=augment is not None and augment.blur_p > 0,
        rotation=augment is not None and augment.rotation > 0,
        mean=mean,
        std=std,
        batch_size=batch_size,
        device=torch.device(device),
        dtype=dtype,
        threads=threads,
    )
