"""Evaluation during training: retrieval if there are labels, and clustering of the source (forgetting)."""

from __future__ import annotations

from contextlib import closing, suppress

import torch

from fastuft.config import TrainConfig, WatchConfig
from fastuft.data import EvalStream, Loading
from fastuft.evaluate import (
    Images,
    UndefinedError,
    clustering_accuracy,
    extract_features,
    in_classes_of,
    read_classes,
    retrieval_accuracy,
)
from fastuft.model import Backbone


def wanted(watch: WatchConfig) -> bool:
    """Whether anything is watched."""
    return watch.every_epochs > 0


def due(watch: WatchConfig, epochs_done: int) -> bool:
    """Whether an evaluation is due after this many epochs."""
    return wanted(watch) and epochs_done % watch.every_epochs == 0


def folders(config: TrainConfig) -> dict[str, Images]:
    """The watched images by name: train and test with labels in the same classes, source.

    Raises:
        ValueError: a folder that is watched for an accuracy has fewer than two classes, or one that training lacks.
    """
    watch, found = config.watch, {}
    if watch.train and watch.test:
        found["train"] = read_classes("watch.train", watch.train, config.data.suffixes)
        found["test"], _ = in_classes_of(
            found["train"], read_classes("watch.test", watch.test, config.data.suffixes, fewest=1)
        )
    if watch.source:
        found["source"] = read_classes("watch.source", watch.source, config.data.suffixes)
    return found


def evaluate(backbone: Backbone, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """Figures of the query encoder's backbone, as fractions: ``retrieval``, ``source_clustering``.

    A figure without a value (the features of all images are the same) is left out: training continues, and the verdict will
    say so.
    """

    def features(images: Images) -> tuple[torch.Tensor, torch.Tensor]:
        stream = EvalStream(
            images.paths,
            images.labels.tolist(),
            loading=Loading.of(config.data, mean=backbone.mean, std=backbone.std, device=device),
            size=config.augment.size,
            batch_size=config.data.batch_size,
        )
        with closing(stream):
            found, kept_labels = extract_features(backbone, stream, device)
        assert kept_labels is not None
        return found, kept_labels

    figures = {}
    watched = folders(config)
    if "train" in watched:
        gallery, gallery_labels = features(watched["train"])
        queries, query_labels = features(watched["test"])
        with suppress(UndefinedError):
            figures["retrieval"] = retrieval_accuracy(gallery, gallery_labels, queries, query_labels)
    if "source" in watched:
        source, source_labels = features(watched["source"])
        with suppress(UndefinedError):
            figures["source_clustering"] = clustering_accuracy(source, source_labels, seed=config.seed)
    return figures
