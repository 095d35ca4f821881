"""Sections that need no labels: the geometry of the features, how they changed, and what was kept of the source."""

from __future__ import annotations

from functools import partial

import torch

from fastuft.evaluate.sections.accuracies import NEIGHBORS, clustering_of
from fastuft.evaluate.sections.context import AFTER, BEFORE, Context
from fastuft.evaluate.sections.part import Part
from fastuft.evaluate.unlabeled import (
    alignment,
    effective_rank,
    lidar,
    linear_cka,
    mean_cosine,
    neighbor_overlap,
    uniformity,
    view_agreement,
)

# Label-free measures use at most this many images: their sampling error is then far below any difference that matters.
SAMPLE = 2048

NO_BEFORE = "No earlier checkpoint was given, so it is not known what changed: neither drift nor neighbors kept."
NO_SOURCE = "No source images were given, so forgetting of the source is not known."
NO_SOURCE_LABELS = (
    "The source has no class folders, so forgetting is not known as an accuracy, only as drift of the features."
)


def label_free(context: Context) -> Part:
    """Alignment, uniformity, rank and view agreement, from two views of each image, and the changes since ``before``."""
    part, paths, seed = Part(), context.folders.train.paths, context.config.seed
    index = context.sample("unlabeled", len(paths), SAMPLE)
    few = [paths[i] for i in index[: SAMPLE // 4]]
    part.put(len(index), "label_free", "images")
    for arm in context.backbones:
        keys = ("label_free",) if arm == AFTER else ("label_free", arm)
        views = context.two_views(arm, few)
        part.put(part.known("Alignment of views", partial(alignment, *views)), *keys, "alignment")
        part.put(part.known("Uniformity", partial(uniformity, views[0], seed=seed)), *keys, "uniformity")
        part.put(part.known("Effective rank", partial(effective_rank, views[0])), *keys, "effective_rank")
        part.put(part.known("LiDAR", partial(lidar, *views)), *keys, "lidar")
        part.put(part.known("Agreement of views", partial(view_agreement, *views)), *keys, "view_agreement")
    if BEFORE not in context.backbones:
        part.statements.append(NO_BEFORE)
        return part
    after, before = (context.features(arm, "train")[torch.from_numpy(index)] for arm in (AFTER, BEFORE))
    _drift(part, "target", before, after)
    kept = part.known("The share of neighbors kept", partial(neighbor_overlap, before, after, NEIGHBORS))
    part.put(kept, "label_free", "neighbor_overlap")
    return part


def _drift(part: Part, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
    keys = ("label_free", "target_drift") if name == "target" else ("source_drift",)
    part.put(part.known(f"CKA of the {name}", partial(linear_cka, before, after)), *keys, "linear_cka")
    part.put(part.known(f"Mean cosine of the {name}", partial(mean_cosine, before, after)), *keys, "mean_cosine")


def source(context: Context) -> Part:
    """Drift of the source's features, and forgetting: how well source images still cluster."""
    part, images = Part(), context.folders.source
    if images is None:
        part.statements.append(NO_SOURCE)
        return part
    if BEFORE in context.backbones:
        _drift(part, "source", context.features(BEFORE, "source"), context.features(AFTER, "source"))
    if not images.labeled:
        part.statements.append(NO_SOURCE_LABELS)
        return part
    for arm in context.backbones:
        what = f"Clustering accuracy of the source {arm} finetuning"
        part.put(part.known(what, partial(clustering_of, context, arm, "source")), "forgetting", arm)
    return part
