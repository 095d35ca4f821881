"""Evaluation while training: retrieval where labels are given, clustering of the source (forgetting)."""

from __future__ import annotations

from contextlib import closing, suppress

import torch

from fastuft.config import TrainConfig, WatchConfig
from fastuft.data import EvalStream, Loading, labeled_folder
from fastuft.evaluate import UndefinedError, clustering_accuracy, extract_features, retrieval_accuracy
from fastuft.model import Backbone


def wanted(watch: WatchConfig) -> bool:
    """Whether anything is watched."""
    return watch.every_epochs > 0


def due(watch: WatchConfig, epochs_done: int) -> bool:
    """Whether this epoch's end is one to look at."""
    return wanted(watch) and epochs_done % watch.every_epochs == 0


def evaluate(backbone: Backbone, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """Figures of the query encoder's backbone as fractions: ``retrieval``, ``source_clustering``.

    One that has no value (the features of all images are the same) is left out: training goes on, and its verdict tells.
    """

    def features(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
        paths, labels, _ = labeled_folder(folder, config.data.suffixes)
        stream = EvalStream(
            paths,
            labels,
            loading=Loading.of(config.data, mean=backbone.mean, std=backbone.std, device=device),
            size=config.augment.size,
            batch_size=config.data.batch_size,
        )
        with closing(stream):
            found, kept_labels = extract_features(backbone, stream, device)
        assert kept_labels is not None
        return found, kept_labels

    figures = {}
    watch = config.watch
    if watch.train and watch.test:
        gallery, gallery_labels = features(watch.train)
        queries, query_labels = features(watch.test)
        with suppress(UndefinedError):
            figures["retrieval"] = retrieval_accuracy(gallery, gallery_labels, queries, query_labels)
    if watch.source:
        source, source_labels = features(watch.source)
        with suppress(UndefinedError):
            figures["source_clustering"] = clustering_accuracy(source, source_labels, seed=config.seed)
    return figures
