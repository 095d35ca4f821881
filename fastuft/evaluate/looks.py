"""Label-free measures of a backbone on a fixed sample of the target, repeated during a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastuft.data import verify_files
from fastuft.evaluate.features import at_work, features_of_views
from fastuft.evaluate.images import decode
from fastuft.evaluate.inputs import UndefinedError
from fastuft.evaluate.unlabeled import (
    alignment,
    effective_rank,
    lidar,
    linear_cka,
    neighbor_overlap,
    uniformity,
    view_agreement,
)
from fastuft.evaluate.verdict import Look
from fastuft.model import Backbone
from fastuft.randomness import keyed_generator

# Area range of the crops in the compared views, whatever crops training uses.
VIEW_SCALE = (0.4, 1.0)


@dataclass(frozen=True)
class Sample:
    """The images of all looks of a run, decoded once, and always the same two views of each.

    Args:
        target: uint8 [3, H, W] each.
        source: likewise, empty without a source.
        size: side of the views, pixels.
        flip_p: probability of the horizontal flip of a view.
        seed: seed of the views.
        batch_size: images per forward pass.
    """

    target: list[Tensor]
    source: list[Tensor]
    size: int
    flip_p: float
    seed: int
    batch_size: int

    @classmethod
    def take(
        cls,
        target: Sequence[str],
        source: Sequence[str],
        *,
        images: int,
        size: int,
        flip_p: float,
        seed: int,
        batch_size: int,
    ) -> Sample:
        """A random sample of at most ``images`` files of each list; files that cannot be decoded are left out."""

        def draw(name: str, paths: Sequence[str]) -> list[Tensor]:
            chosen = keyed_generator(seed, "look", name).permutation(len(paths))[:images]
            drawn = [paths[i] for i in sorted(chosen.tolist())]
            bad = {entry.path for entry in verify_files(drawn, decode=True)}
            return decode([path for path in drawn if path not in bad], round(size * 256 / 224))

        return cls(draw("target", target), draw("source", source), size, flip_p, seed, batch_size)

    def features(self, backbone: Backbone, device: torch.device) -> dict[str, Tensor]:
        """Features [N, F] of the whole images (target, source) and of two views of the target images (first, second)."""

        def of(images: Sequence[Tensor], views: int, scale: tuple[float, float], flip_p: float) -> list[Tensor]:
            return features_of_views(
                backbone,
                images,
                views,
                generator=keyed_generator(self.seed, "look", "views"),
                size=self.size,
                scale=scale,
                flip_p=flip_p,
                batch_size=self.batch_size,
                device=device,
            )

        with at_work([backbone], device):
            first, second = of(self.target, 2, VIEW_SCALE, self.flip_p)
            found = {"target": of(self.target, 1, (1.0, 1.0), 0.0)[0], "first": first, "second": second}
            if self.source:
                found["source"] = of(self.source, 1, (1.0, 1.0), 0.0)[0]
        return found


def look_at(features: dict[str, Tensor], start: dict[str, Tensor] | None, step: int) -> Look:
    """The measures of a backbone's features; those that compare with the start are None if it is unknown.

    Args:
        features: of the sample, [N, F] each, see :meth:`Sample.features`.
        start: of the same sample at the start, [N, F] each.
        step: steps done.
    """
    target, first, second = features["target"], features["first"], features["second"]
    before = start or {}

    def value(measure: Callable[[], float]) -> float | None:
        try:
            return measure()
        except UndefinedError:
            return None

    kept = before.get("target")
    source, source_before = features.get("source"), before.get("source")
    return Look(
        step=step,
        images=len(target),
        effective_rank=value(lambda: effective_rank(target)),
        lidar=value(lambda: lidar(first, second)),
        uniformity=value(lambda: uniformity(target)),
        alignment=value(lambda: alignment(first, second)),
        view_agreement=value(lambda: view_agreement(first, second)),
        neighbors_kept=None if kept is None else value(lambda: neighbor_overlap(kept, target)),
        source_cka=(
            None if source is None or source_before is None else value(lambda: linear_cka(source_before, source))
        ),
    )
