"""Sections that need labels: clustering, retrieval, few-shot finetuning and FixMatch."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypedDict, TypeVar

import numpy as np
from torch import Tensor

from fastuft.device import Precision
from fastuft.evaluate.clustering import clustering_accuracy
from fastuft.evaluate.few_shot import FewShotResult, fewshot
from fastuft.evaluate.inputs import ArrayLike
from fastuft.evaluate.prototypes import prototype_accuracy
from fastuft.evaluate.retrieval import retrieval_accuracy
from fastuft.evaluate.sections.context import AFTER, BEFORE, Context
from fastuft.evaluate.sections.part import Part
from fastuft.evaluate.semi_supervised import FixMatchResult, fixmatch
from fastuft.model import Backbone
from fastuft.randomness import keyed_seed

NEIGHBORS = 5
SHOTS = (1, 2, 4, 8)  # of the class means, if few-shot finetuning has none
COMPARABLE = 1.25  # ratio of two networks' feature norms up to which one learning rate suits both classifiers

Result = TypeVar("Result", bound=FewShotResult)

NO_LABELS = (
    "No labels were given (train has no class folders), so retrieval, clustering and few-shot accuracy are not known. "
    "The measures below say how the representation changed, not whether it became better. The best check is to look at "
    "the neighbors before and after; a few labeled images per class would allow a real one."
)
NO_TEST = (
    "No labeled test set was given, so retrieval and few-shot accuracy on unseen images are not known. Clustering "
    "accuracy describes the training images themselves."
)


class Spread(TypedDict):
    """Mean, sample standard deviation (None for a single trial) and the trials themselves."""

    mean: float
    std: float | None
    trials: list[float]


def spread(values: Sequence[float]) -> Spread:
    """The spread of an accuracy over its trials."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "trials": [float(v) for v in values]}


def clustering_of(context: Context, arm: str, name: str) -> Spread:
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


def class_means(context: Context) -> Part:
    """Few-shot accuracy of the nearest class mean, for the values of K of few-shot finetuning that every class allows."""
    part, folders = Part(), context.folders
    if not folders.judged:
        return part
    assert folders.test is not None
    train_labels, test_labels = folders.train.labels, folders.test.labels
    smallest = int(np.bincount(train_labels).min())

    def of(arm: str, shots: int) -> Spread:
        train, test = context.features(arm, "train"), context.features(arm, "test")
        return spread(prototype_accuracy(train, train_labels, test, test_labels, shots, seed=context.config.seed))

    for arm in context.backbones:
        for k in context.config.fewshot.shots or SHOTS:
            if k <= smallest:
                what = f"{k}-shot accuracy of class means" + ("" if arm == AFTER else f" {arm}")
                part.put(part.known(what, partial(of, arm, k)), *_keys(arm, "class_means", str(k)))
    return part


def few_shot(context: Context) -> Part:
    """Accuracy after finetuning on K labeled images per class; if asked for, also of the start, on the same images."""
    part, config = Part(), context.config
    names = ("top1", "mean_class", "train_loss")

    def of(arm: str) -> FewShotResult | None:
        def run(common: _Common, shots: list[int]) -> FewShotResult:
            progress = partial(context.progress, f"few-shot runs, {arm}")
            return fewshot(**common, config=dataclasses.replace(config.fewshot, shots=shots), progress=progress)

        what = "{}-shot accuracy" if arm == AFTER else f"{{}}-shot accuracy {arm}"
        return _by_shots(part, context, run, config.fewshot.shots, _keys(arm, "fewshot"), what, names, arm)

    for arm in [AFTER, BEFORE] if config.before_fewshot and BEFORE in context.backbones else [AFTER]:
        words = "" if arm == AFTER else f" {arm}"
        result = part.known(f"Few-shot accuracy{words}", partial(of, arm))
        if result is None:
            continue
        if result.unsettled:
            worst = max(max(result.train_loss[k]) for k in result.unsettled)
            guess = math.log(len(context.folders.train.classes))
            part.statements.append(
                f"Few-shot finetuning{words} did not converge for K = {', '.join(map(str, result.unsettled))} (training loss "
                f"up to {worst:.2f}; guessing gives {guess:.2f}), so its accuracies there say little about the features: try a "
                f"fewshot.lr other than {config.fewshot.lr:g}."
            )
    if {"fewshot", BEFORE} <= part.metrics.keys():
        before, after = (float(context.features(arm, "train").norm(dim=1).mean()) for arm in (BEFORE, AFTER))
        if max(before, after) > COMPARABLE * min(before, after):
            part.statements.append(
                f"Few-shot finetuning used fewshot.lr={config.fewshot.lr:g} before and after, but the features' mean norm went "
                f"from {before:.3g} to {after:.3g}, and a rate that suits one may not suit the other. The class means do not "
                "depend on a rate or a norm: compare those."
            )
    return part


def semi_supervised(context: Context) -> Part:
    """Accuracy after FixMatch on K labeled images per class and all other images without their labels."""
    part, config = Part(), context.config

    def run(common: _Common, shots: list[int]) -> FixMatchResult:
        return fixmatch(
            **common,
            config=dataclasses.replace(config.semi, shots=shots),
            finetuning=config.fewshot,
            loader=config.loader,
            progress=partial(context.progress, "FixMatch epochs"),
        )

    what, names = (
        "FixMatch accuracy with {} labeled images per class",
        ("top1", "mean_class", "train_loss", "confident"),
    )
    result = _by_shots(part, context, run, config.semi.shots, ("fixmatch",), what, names)
    unused = [] if result is None else [k for k, shares in result.confident.items() if not max(shares)]
    if unused:
        part.statements.append(
            f"FixMatch with {', '.join(map(str, unused))} labeled images per class made no confident prediction on the "
            "unlabeled images, so it was no more than few-shot finetuning with more views."
        )
    return part


class _Common(TypedDict):
    """The arguments that few-shot finetuning and FixMatch share."""

    backbone: Backbone
    train_paths: Sequence[str]
    train_labels: ArrayLike
    test: Iterable[tuple[Tensor, Tensor | None]]
    test_labels: ArrayLike
    size: int
    resize: int
    precision: Precision
    trials: int
    seed: int
    classes: Sequence[str]


def _by_shots(
    part: Part,
    context: Context,
    run: Callable[[_Common, list[int]], Result],
    shots: Sequence[int],
    keys: tuple[str, ...],
    what: str,
    names: Sequence[str],
    arm: str = AFTER,
) -> Result | None:
    """Measure an accuracy for each K that has enough images, and record it.

    Args:
        part: receives the figures, the draws, and a statement for each K without a figure.
        context: the evaluation.
        run: takes the common arguments and the values of K.
        shots: the values of K that are asked for.
        keys: the figures' keys in eval.json.
        what: names the accuracy in statements, with {} for K.
        names: the values of the result to record, as spreads over trials.
        arm: whose accuracy.

    Returns:
        The result; None without labels, or if no K has enough images.
    """
    train, test, config = context.folders.train, context.folders.test, context.config
    possible = _possible(part, context, shots, what)
    if not possible:
        return None
    assert test is not None
    with context.stream(arm, test) as stream:
        common = _Common(
            backbone=context.backbones[arm],
            train_paths=train.paths,
            train_labels=train.labels,
            test=stream,
            test_labels=test.labels,
            size=context.size,
            resize=context.resize,
            precision=config.precision,
            trials=config.trials,
            seed=config.seed,
            classes=train.classes,
        )
        result = run(common, possible)
    part.put({str(k): {name: spread(getattr(result, name)[k]) for name in names} for k in result.top1}, *keys)
    for k, reason in result.undefined.items():
        part.cannot(what.format(k), reason)
    for trial, rows in enumerate(result.draws):
        part.draws[str(trial)] = {
            name: [os.path.relpath(train.paths[i], config.train) for i in row]
            for name, row in zip(train.classes, rows, strict=True)
        }
    return result


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
