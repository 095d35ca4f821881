"""Sections that the report shows as pictures: the t-SNE map, and query images with their neighbors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from fastuft.evaluate.embedding import tsne
from fastuft.evaluate.images import thumbnail_png
from fastuft.evaluate.retrieval import nearest_neighbors
from fastuft.evaluate.sections.accuracies import NEIGHBORS
from fastuft.evaluate.sections.context import AFTER, Context
from fastuft.evaluate.sections.part import Part
from fastuft.names import printable


def _shown(context: Context) -> str:
    """The folder to show: unseen images if there are any."""
    return "train" if context.folders.test is None else "test"


def tsne_map(context: Context) -> Part:
    """A t-SNE map of a random sample of the images."""
    part, config, name = Part(), context.config, _shown(context)
    images = context.folders.named()[name]
    if not config.map.points:
        return part
    chosen = context.sample("map", len(images.paths), config.map.points)
    features = context.features(AFTER, name)[torch.from_numpy(chosen)]
    part.arrays["tsne"] = tsne(features, perplexity=config.map.perplexity, seed=config.seed)
    labels = images.labels[chosen] if images.labeled else np.full(len(chosen), -1)
    part.arrays["tsne_labels"] = labels.astype(np.int64)
    return part


def gallery(context: Context) -> Part:
    """Query images with their nearest training images by each backbone, and thumbnails of all of them."""
    part, name, train = Part(), _shown(context), context.folders.train
    queries = context.folders.named()[name]
    count = min(NEIGHBORS, len(train.paths) - (name == "train"))
    chosen = context.sample("gallery", len(queries.paths), context.config.gallery)
    if not len(chosen):
        return part
    own = chosen if name == "train" else None
    files = [queries.paths[i] for i in chosen]
    for arm in context.backbones:
        prefix = "" if arm == AFTER else f"{arm}_"
        features = context.features(arm, name)[torch.from_numpy(chosen)]
        values, found = nearest_neighbors(features, context.features(arm, "train"), count, own=own)
        neighbors = [train.paths[i] for i in found.flatten().tolist()]
        part.arrays[f"{prefix}neighbors"] = np.arange(len(files), len(files) + len(neighbors)).reshape(-1, count)
        part.arrays[f"{prefix}similarity"] = values.numpy().astype(np.float32)
        if queries.labeled and train.labeled:
            part.arrays[f"{prefix}right"] = train.labels[found.numpy()] == queries.labels[chosen][:, None]
        files += neighbors
    unique = {path: i for i, path in enumerate(dict.fromkeys(files))}
    thumbs = [thumbnail_png(path) for path in unique]
    position = np.array([unique[path] for path in files])
    for key in ("neighbors", "before_neighbors"):
        if key in part.arrays:
            part.arrays[key] = position[part.arrays[key]]
    part.arrays.update(
        queries=position[: len(chosen)],
        thumb_png=np.concatenate(thumbs),
        thumb_offsets=np.cumsum([0, *map(len, thumbs)]),
        thumb_names=np.array([printable(os.path.join(*Path(path).parts[-2:])) for path in unique]),
    )
    return part
