"""Streams of views: training (two views a target or replayed image), labeled training, evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastuft.config import AugmentConfig, DataConfig
from fastuft.data.backend import Request, ViewSpec
from fastuft.data.feed import BadFileRule, Feed, Loader
from fastuft.data.files import BadFile, BadImageError, image_size
from fastuft.data.manifest import Manifest
from fastuft.data.order import EpochPlan
from fastuft.data.strong import StrongConfig, draw_strong, draws_of
from fastuft.data.views import center_views, draw_views, uniforms
from fastuft.randomness import keyed_generator

Triple = tuple[float, float, float]

_PROBED = 256  # images looked at to reserve memory in a GPU's decoder


@dataclass(frozen=True)
class Batch:
    """One rank's share of a training step.

    Args:
        query: [b, 3, H, W] channels_last, normalized; the views of the query encoder.
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
        mean: normalization for pixels in [0, 1].
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
        self._plan = EpochPlan(
            num_target=manifest.num_target,
            num_source=manifest.num_source,
            batch=data.batch_size,
            mode=data.replay_mode,
            share=data.replay_share,
            drop_last=data.drop_last,
        )
        self.steps_per_epoch = self._plan.steps
        self.manifest = manifest
        self.augment = augment
        self.seed = seed
        self.rank = rank
        self.batch_size = data.batch_size
        self.local_batch = data.batch_size // world_size
        device = torch.device(device)
        spec = _spec(
            augment,
            num_views=2,
            mean=mean,
            std=std,
            batch_size=self.local_batch,
            device=device,
            dtype=dtype,
            threads=data.threads,
            prefetch=data.prefetch,
            hw_decoder_load=data.hw_decoder_load,
            largest=_largest(manifest.paths) if device.type == "cuda" else (0, 0),
        )
        pools = (range(manifest.num_target), range(manifest.num_target, len(manifest)))
        rule = BadFileRule(data.on_bad_file == "skip", seed, pools)
        self._feed = Feed(manifest.paths, spec, data.loader, rule, data.max_megapixels)

    @property
    def bad_files(self) -> list[BadFile]:
        """Files skipped so far by this rank, with the reason."""
        return self._feed.bad_files

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of one epoch, from ``start_step`` on.

        Raises:
            BadImageError: a bad file under ``on_bad_file: error``; it names the file and the remedy.
        """
        order = self._plan.order(self.seed, epoch)
        is_source = self.manifest.is_source

        def request(step: int) -> Request:
            first = step * self.batch_size + self.rank * self.local_batch
            positions = np.arange(first, min(first + self.local_batch, len(order)))
            index = self._feed.usable(order[positions], epoch, positions)
            sizes = self._feed.sizes[index]
            draws = (uniforms(self.seed, epoch, view, positions) for view in range(2))
            views = tuple(draw_views(self.augment, sizes, u) for u in draws)
            return Request(self._feed.names(index), views, index)

        for step, made, (query, key) in self._feed.batches(request, range(start_step, self.steps_per_epoch)):
            index = torch.from_numpy(made.index)
            yield Batch(query, key, index, torch.from_numpy(is_source[made.index]), epoch, step)

    def prefill(self, count: int) -> Iterator[Tensor]:
        """Key views [b, 3, H, W] of at least ``count`` images over all ranks, to fill the queue before training.

        The order and the views belong to epoch -1, so training draws none of them. More images than the manifest
        holds are taken from further passes (-2, -3, ...). Batches are whole, so the last may go beyond ``count``.
        """
        epoch = -1
        while count > 0:
            for batch in self.epoch(epoch):
                yield batch.key
                count -= self.batch_size
                if count <= 0:
                    break
            epoch -= 1

    def close(self) -> None:
        """Give back threads and memory."""
        self._feed.close()


class EvalStream:
    """Images in order: shorter side to ``resize``, center crop of ``size``, normalized; the last partial batch is kept.

    Args:
        paths: files.
        labels: their labels, or None.
        size: side of the crop, pixels.
        resize: shorter side the crop is taken from; 0 means size * 256 / 224.
        batch_size: images a batch.
        device: where they are wanted.
        dtype: of the images.
        mean: normalization for pixels in [0, 1].
        std: likewise.
        loader: auto, dali or torch.
        threads: decoding threads; 0 derives it.

    Raises:
        ValueError: no images, a ``resize`` below ``size``, or labels of another length than paths.
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
        self.paths = list(paths)
        self.labels = _labels(self.paths, labels)
        self.size, self.resize, self.batch_size = size, resize, batch_size
        plain = AugmentConfig(size=size, jitter_p=0, grayscale_p=0, blur_p=0, flip_p=0)
        spec = _spec(
            plain,
            mean=mean,
            std=std,
            batch_size=min(batch_size, len(self.paths)),
            device=torch.device(device),
            dtype=dtype,
            threads=threads,
        )
        self._feed = Feed(self.paths, spec, loader)

    def __len__(self) -> int:
        """Batches."""
        return -(-len(self.paths) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(images [b, 3, size, size], labels int64 [b] or None).

        Raises:
            BadImageError: a bad file; it names the file and the remedy.
        """

        def request(step: int) -> Request:
            rows = np.arange(step * self.batch_size, min((step + 1) * self.batch_size, len(self.paths)))
            index = self._feed.usable(rows)
            views = (center_views(self._feed.sizes[index], self.size, self.resize),)
            return Request(self._feed.names(index), views, index)

        for _, made, (images,) in self._feed.batches(request, range(len(self))):
            yield images, None if self.labels is None else self.labels[made.index]

    def close(self) -> None:
        """Give back threads and memory."""
        self._feed.close()


class LabeledTrainStream:
    """Random resized crops and flips of labeled images, for finetuning a classifier.

    Args:
        paths: files.
        labels: their labels.
        augment: crop and flip are taken from it; color, blur and rotation as they stand there.
        batch_size: images a batch; the last partial batch is kept.
        seed: seed of order and views.
        device: where they are wanted.
        dtype: of the images.
        mean: normalization for pixels in [0, 1].
        std: likewise.
        loader: auto, dali or torch.
        threads: decoding threads; 0 derives it.

    Raises:
        ValueError: no images, or labels of another length than paths.
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
        found = _labels(self.paths, labels)
        assert found is not None
        self.labels = found
        self.augment, self.batch_size, self.seed = augment, batch_size, seed
        spec = _spec(
            augment,
            mean=mean,
            std=std,
            batch_size=min(batch_size, len(self.paths)),
            device=torch.device(device),
            dtype=dtype,
            threads=threads,
        )
        self._feed = Feed(self.paths, spec, loader)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images [b, 3, size, size], labels int64 [b]) of one shuffled pass.

        Raises:
            BadImageError: a bad file; it names the file and the remedy.
        """
        order = keyed_generator(self.seed, "order", epoch).permutation(len(self.paths))

        def request(step: int) -> Request:
            positions = np.arange(step * self.batch_size, min((step + 1) * self.batch_size, len(order)))
            index = self._feed.usable(order[positions])
            u = uniforms(self.seed, epoch, 0, positions)
            return Request(self._feed.names(index), (draw_views(self.augment, self._feed.sizes[index], u),), index)

        for _, made, (images,) in self._feed.batches(request, range(-(-len(order) // self.batch_size))):
            yield images, self.labels[made.index]

    def close(self) -> None:
        """Give back threads and memory."""
        self._feed.close()


class WeakStrongStream:
    """A weak and a strong view of unlabeled images, for consistency training (FixMatch).

    Weak: crop and flip. Strong: another crop and flip, then RandAugment and Cutout. The file is decoded once for both.
    Order and draws are functions of (seed, epoch, position).

    Args:
        paths: files.
        augment: crop and flip of both views; it may hold no color, blur or rotation.
        strong: RandAugment and Cutout.
        batch_size: images a batch; the last partial batch is kept.
        seed: seed of order and views.
        device: where they are wanted.
        dtype: of the images.
        mean: normalization for pixels in [0, 1].
        std: likewise.
        loader: auto, dali or torch.
        threads: decoding threads; 0 derives it.

    Raises:
        ValueError: no images, or an ``augment`` that changes colors.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        augment: AugmentConfig,
        strong: StrongConfig,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        mean: Triple,
        std: Triple,
        loader: Loader = "auto",
        threads: int = 0,
    ) -> None:
        if augment.jitter_p or augment.grayscale_p or augment.blur_p:
            raise ValueError(
                "augment.jitter_p, grayscale_p and blur_p must be 0 here: RandAugment works on whole gray levels, and "
                "the weak view keeps its colors"
            )
        self.paths = list(paths)
        _labels(self.paths, None)
        self.augment, self.strong, self.batch_size, self.seed = augment, strong, batch_size, seed
        spec = _spec(
            augment,
            num_views=2,
            mean=mean,
            std=std,
            batch_size=min(batch_size, len(self.paths)),
            device=torch.device(device),
            dtype=dtype,
            threads=threads,
        )
        self._feed = Feed(self.paths, dataclasses.replace(spec, strong=strong), loader)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.paths) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(weak, strong) views [b, 3, size, size] each of one shuffled pass.

        Raises:
            BadImageError: a bad file; it names the file and the remedy.
        """
        order = keyed_generator(self.seed, "order", epoch).permutation(len(self.paths))

        def request(step: int) -> Request:
            positions = np.arange(step * self.batch_size, min((step + 1) * self.batch_size, len(order)))
            index = self._feed.usable(order[positions])
            sizes = self._feed.sizes[index]
            views = tuple(
                draw_views(self.augment, sizes, uniforms(self.seed, epoch, view, positions)) for view in range(2)
            )
            u = uniforms(self.seed, epoch, "strong", positions, draws_of(self.strong))
            return Request(self._feed.names(index), views, index, draw_strong(self.strong, self.augment.size, u))

        for _, _, (weak, strong) in self._feed.batches(request, range(len(self))):
            yield weak, strong

    def close(self) -> None:
        """Give back threads and memory."""
        self._feed.close()


def _labels(paths: Sequence[str], labels: Sequence[int] | None) -> Tensor | None:
    if not paths:
        raise ValueError("paths is empty; give at least one image")
    if labels is None:
        return None
    if len(labels) != len(paths):
        raise ValueError(f"labels has {len(labels)} entries for {len(paths)} images; give one a image")
    return torch.as_tensor(labels, dtype=torch.int64)


def _spec(
    augment: AugmentConfig,
    *,
    mean: Triple,
    std: Triple,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    num_views: int = 1,
    prefetch: int = 2,
    hw_decoder_load: float = 0.9,
    largest: tuple[int, int] = (0, 0),
) -> ViewSpec:
    return ViewSpec(
        size=augment.size,
        num_views=num_views,
        color=augment.jitter_p > 0 or augment.grayscale_p > 0,
        blur=augment.blur_p > 0,
        rotation=augment.rotation > 0,
        mean=mean,
        std=std,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        threads=threads,
        prefetch=prefetch,
        hw_decoder_load=hw_decoder_load,
        largest=largest,
    )


def _largest(paths: Sequence[str]) -> tuple[int, int]:
    """Largest width and height among some of the images, evenly spread; bad files do not count."""
    sizes = [(0, 0)]
    for path in paths[:: max(1, len(paths) // _PROBED)]:
        try:
            sizes.append(image_size(path))
        except BadImageError:
            continue
    width, height = (max(side) for side in zip(*sizes, strict=True))
    return width, height
