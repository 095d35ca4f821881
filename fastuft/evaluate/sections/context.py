"""What all sections of one evaluation share: folders, backbones, features, settings and timings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from fastuft.config import EvalConfig
from fastuft.data import EvalStream, Loading, resolve_loader
from fastuft.device import choose_device
from fastuft.evaluate.features import cached_features, features_of_views
from fastuft.evaluate.folders import Folders, Images
from fastuft.evaluate.images import decode
from fastuft.evaluate.inputs import check_finite
from fastuft.evaluate.looks import VIEW_SCALE
from fastuft.model import Backbone
from fastuft.randomness import keyed_generator

AFTER, BEFORE = "after", "before"
Progress = Callable[[str, int, int], None]  # (name of the part, units done, total units)


class Context:
    """Folders, backbones and their features; each backbone processes each folder once.

    Args:
        config: the evaluation.
        folders: its images.
        backbones: ``after`` and, where there is something to compare with, ``before``; on ``device`` in eval mode.
        size: input side, pixels.
        progress: called with the progress of the longer parts.
    """

    def __init__(
        self,
        config: EvalConfig,
        folders: Folders,
        backbones: Mapping[str, Backbone],
        size: int,
        progress: Progress | None = None,
    ) -> None:
        self.progress = progress or (lambda part, done, total: None)
        self.config, self.folders, self.backbones, self.size = config, folders, backbones, size
        self.device = choose_device(config.device)
        self.resize = config.resize or round(size * 256 / 224)
        self.timings: dict[str, float] = {}
        self._features: dict[tuple[str, str], Tensor] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the timing ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def stream(self, arm: str, images: Images) -> Iterator[EvalStream]:
        """The images in order, normalized for the arm's backbone."""
        config, backbone = self.config, self.backbones[arm]
        stream = EvalStream(
            images.paths,
            images.labels.tolist() if images.labeled else None,
            loading=Loading(backbone.mean, backbone.std, self.device, loader=config.loader),
            size=self.size,
            resize=self.resize,
            batch_size=config.batch_size,
        )
        try:
            yield stream
        finally:
            stream.close()

    def extract(self) -> None:
        """Compute the features of every folder with every backbone, which the sections read with :meth:`features`.

        Raises:
            ValueError: a file cannot be read, or features are not finite.
        """
        with self.timed("features"):
            for name, images in self.folders.named().items():
                for arm in self.backbones:
                    found = self._extract(arm, name, images)
                    check_finite(f"the features of {name} ({arm})", found)
                    self._features[arm, name] = found

    def _extract(self, arm: str, name: str, images: Images) -> Tensor:
        config, backbone = self.config, self.backbones[arm]
        loader = resolve_loader(config.loader)
        settings = f"{self.size} {self.resize} {backbone.mean} {backbone.std} {loader} {self.device.type}"
        if backbone.traits.pool != "own":
            settings += f" {backbone.traits.pool}"
        with self.stream(arm, images) as stream:
            return cached_features(
                backbone,
                self._told(f"features of {name}, {arm}", stream, len(images.paths)),
                images.paths,
                config.cache,
                settings=settings,
                device=self.device,
                precision=config.precision,
            )

    def _told(self, part: str, stream: EvalStream, count: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The batches of a stream, with its progress in images."""
        done = 0
        for images, labels in stream:
            yield images, labels
            done += len(images)
            self.progress(part, done, count)

    def features(self, arm: str, name: str) -> Tensor:
        """The features [N, F] of a folder (train, test or source), on the CPU."""
        return self._features[arm, name]

    def sample(self, name: str, count: int, most: int) -> np.ndarray:
        """Sorted indices of ``most`` random items out of ``count``, the same for every backbone."""
        return np.sort(keyed_generator(self.config.seed, "sample", name).permutation(count)[:most])

    def two_views(self, arm: str, paths: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features of two random crops of each image, on the CPU, with the same crops for every backbone."""
        config = self.config
        first, second = features_of_views(
            self.backbones[arm],
            decode(paths, self.resize),
            2,
            generator=keyed_generator(config.seed, "views"),
            size=self.size,
            scale=VIEW_SCALE,
            flip_p=config.fewshot.flip_p,
            batch_size=config.batch_size,
            device=self.device,
            precision=config.precision,
        )
        return first, second
