"""Sections that need labels: clustering, retrieval, few-shot finetuning and FixMatch."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from fastuft.evaluate.clustering import clustering_accuracy
from fastuft.evaluate.retrieval import retrieval_accuracy
from fastuft.evaluate.sections.context import AFTER, Context
from fastuft.evaluate.sections.part import Part
from fastuft.evaluate.semi import fixmatch
from fastuft.evaluate.shots import FewShotResult, fewshot
from fastuft.randomness import keyed_seed

NEIGHBORS = 5

NO_LABELS = (
    "No labels were given (train has no class folders), so retrieval, clustering and few-shot accuracy are not known. "
    "The measures below say how the representation changed, not whether it became better. The best check is to look at "
    "the neighbors before and after; a few labeled images per class would allow a real one."
)
NO_TEST = (
    "No labeled test set was given, so retrieval and few-shot accuracy on unseen images are not known. Clustering "
    "accuracy describes the training images themselves."
)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for a single trial) and the trials themselves."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "trials": [float(v) for v in values]}


def clustering_of(context: Context, arm: str, name: str) -> dict[str, Any]:
    """Spread over trials of the clustering accuracy of a labeled folder (train or source)."""
    config = context.config
    features, labels = context.features(arm, name), context.folders.named()[name].labels
    found = []
    for trial in range(config.trials):
        seed = keyed_seed(config.seed, "clustering", trial)
        restarts = config.clustering.restarts
        found.append(clustering_accuracy(features, labels, restarts=restarts, seed=seed, device=context.device))
        context.progress(f"K-means on {name}, {arm}", trial + 1, config.trials)
    return spread(found)


def _keys(arm: str, *keys: str) -> tuple[str, ...]:
    """The keys of an arm's metric in eval.json: those of the evaluated backbone are at the top level."""
    return keys if arm == AFTER else (arm, *keys)


def clustering(context: Context) -> Part:
    """BCubed precision of K-means on the training images."""
    part = Part()
    if not context.folders.train.labeled:
        part.statements.append(NO_LABELS)
        return part
    for arm in context.backbones:
        what = "Clustering accuracy" if arm == AFTER else f"Clustering accuracy {arm}"
        part.put(part.known(what, partial(clustering_of, context, arm, "train")), *_keys(arm, "clustering"))
    return part


def retrieval(context: Context) -> Part:
    """Share of each test image's nearest training images that have its label."""
    part, folders = Part(), context.folders
    if not folders.judged:
        if folders.train.labeled:
            part.statements.append(NO_TEST)
        return part
    assert folders.test is not None
    train_labels, test_labels = folders.train.labels, folders.test.labels

    def of(arm: str) -> float:
        gallery, queries = context.features(arm, "train"), context.features(arm, "test")
        return retrieval_accuracy(gallery, train_labels, queries, test_labels, NEIGHBORS, device=context.device)

    for arm in context.backbones:
        what = "Retrieval accuracy" if arm == AFTER else f"Retrieval accuracy {arm}"
        part.put(part.known(what, partial(of, arm)), *_keys(arm, "retrieval"))
    return part


def few_shot(context: Context) -> Part:
    """Accuracy after finetuning on K labeled images per class."""
    part, config, folders = Part(), context.config, context.folders
    shots = _possible(part, context, config.fewshot.shots, "{}-shot accuracy")
    if not shots:
        return part
    assert folders.test is not None
    with context.stream(AFTER, folders.test) as stream:
        result = fewshot(
            context.backbones[AFTER],
            folders.train.paths,
            folders.train.labels,
            stream,
            folders.test.labels,
            config=dataclasses.replace(config.fewshot, shots=shots),
            size=context.size,
            resize=context.resize,
            precision=config.precision,
            trials=config.trials,
            seed=config.seed,
            classes=folders.train.classes,
            progress=partial(context.progress, "few-shot runs"),
        )
    _take(part, context, result, "fewshot", "{}-shot accuracy", "top1", "mean_class", "train_loss")
    worst, guess = max(max(losses) for losses in result.train_loss.values()), math.log(len(folders.train.classes))
    if worst > 0.9 * guess:
        part.statements.append(
            f"Few-shot finetuning did not converge (training loss up to {worst:.2f}; guessing gives {guess:.2f}), so its "
            f"accuracies say little about the features: try a fewshot.lr other than {config.fewshot.lr:g}."
        )
    return part


def semi_supervised(context: Context) -> Part:
    """Accuracy after FixMatch on K labeled images per class and all other images without their labels."""
    part, config, folders = Part(), context.config, context.folders
    shots = _possible(part, context, config.semi.shots, "FixMatch accuracy with {} labeled images per class")
    if not shots:
        return part
    assert folders.test is not None
    with context.stream(AFTER, folders.test) as stream:
        result = fixmatch(
            context.backbones[AFTER],
            folders.train.paths,
            folders.train.labels,
            stream,
            folders.test.labels,
            config=dataclasses.replace(config.semi, shots=shots),
            finetuning=config.fewshot,
            size=context.size,
            resize=context.resize,
            precision=config.precision,
            trials=config.trials,
            seed=config.seed,
            classes=folders.train.classes,
            loader=config.loader,
            progress=partial(context.progress, "FixMatch epochs"),
        )
    what = "FixMatch accuracy with {} labeled images per class"
    _take(part, context, result, "fixmatch", what, "top1", "mean_class", "train_loss", "confident")
    unused = [k for k, shares in result.confident.items() if not max(shares)]
    if unused:
        part.statements.append(
            f"FixMatch with {', '.join(map(str, unused))} labeled images per class made no confident prediction on the "
            "unlabeled images, so it was no more than few-shot finetuning with more views."
        )
    return part


def _possible(part: Part, context: Context, shots: Sequence[int], what: str) -> list[int]:
    """The values of K for which every class has enough images; the others become statements. Empty without labels."""
    train = context.folders.train
    if not context.folders.judged:
        return []
    counts = np.bincount(train.labels)
    smallest = int(counts.min())
    for k in shots:
        if k > smallest:
            part.cannot(
                what.format(k),
                f"it needs {k} training images of every class, but class {train.classes[int(counts.argmin())]!r} has only "
                f"{smallest}",
            )
    return [k for k in shots if k <= smallest]


def _take(part: Part, context: Context, result: FewShotResult, key: str, what: str, *names: str) -> None:
    """Record the spread over trials of the named values by K, the draws, and the K without a value."""
    part.put({str(k): {name: spread(getattr(result, name)[k]) for name in names} for k in result.top1}, key)
    for k, reason in result.undefined.items():
        part.cannot(what.format(k), reason)
    train = context.folders.train
    for trial, rows in enumerate(result.draws):
        part.draws[str(trial)] = {
            name: [os.path.relpath(train.paths[i], context.config.train) for i in row]
            for name, row in zip(train.classes, rows, strict=True)
        }
