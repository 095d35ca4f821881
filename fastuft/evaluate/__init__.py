"""Evaluation of a representation: the paper's metrics over features, few-shot finetuning, and label-free measures.

Functions take features, labels or a backbone module, never a trainer. Metrics are fractions in [0, 1]; only reports show
them in per cent. The metrics over features need only NumPy and torch: names are imported on first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "mean_class_accuracy": "accuracy",
    "top1_accuracy": "accuracy",
    "KMeans": "clustering",
    "bcubed_precision": "clustering",
    "clustering_accuracy": "clustering",
    "kmeans": "clustering",
    "tsne": "embedding",
    "Evaluation": "evaluation",
    "evaluate_backbone": "evaluation",
    "write_evaluation": "evaluation",
    "cached_features": "features",
    "extract_features": "features",
    "weights_hash": "features",
    "Images": "folders",
    "in_classes_of": "folders",
    "read_classes": "folders",
    "UndefinedError": "inputs",
    "FixMatchResult": "semi_supervised",
    "fixmatch": "semi_supervised",
    "FewShotResult": "few_shot",
    "draw_shots": "draws",
    "fewshot": "few_shot",
    "prototype_accuracy": "prototypes",
    "nearest_neighbors": "retrieval",
    "retrieval_accuracy": "retrieval",
    "alignment": "unlabeled",
    "linear_cka": "unlabeled",
    "mean_cosine": "unlabeled",
    "neighbor_overlap": "unlabeled",
    "uniformity": "unlabeled",
    "Sample": "looks",
    "look_at": "looks",
    "effective_rank": "unlabeled",
    "lidar": "unlabeled",
    "view_agreement": "unlabeled",
    "Look": "verdict",
    "Rule": "verdict",
    "Verdict": "verdict",
    "best_look": "verdict",
    "judge": "verdict",
    "should_stop": "verdict",
}

__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:  # the redundant aliases mark re-exports for type checkers
    from fastuft.evaluate.accuracy import mean_class_accuracy as mean_class_accuracy
    from fastuft.evaluate.accuracy import top1_accuracy as top1_accuracy
    from fastuft.evaluate.clustering import KMeans as KMeans
    from fastuft.evaluate.clustering import bcubed_precision as bcubed_precision
    from fastuft.evaluate.clustering import clustering_accuracy as clustering_accuracy
    from fastuft.evaluate.clustering import kmeans as kmeans
    from fastuft.evaluate.draws import draw_shots as draw_shots
    from fastuft.evaluate.embedding import tsne as tsne
    from fastuft.evaluate.evaluation import Evaluation as Evaluation
    from fastuft.evaluate.evaluation import evaluate_backbone as evaluate_backbone
    from fastuft.evaluate.evaluation import write_evaluation as write_evaluation
    from fastuft.evaluate.features import cached_features as cached_features
    from fastuft.evaluate.features import extract_features as extract_features
    from fastuft.evaluate.features import weights_hash as weights_hash
    from fastuft.evaluate.few_shot import FewShotResult as FewShotResult
    from fastuft.evaluate.folders import Images as Images
    from fastuft.evaluate.folders import in_classes_of as in_classes_of
    from fastuft.evaluate.folders import read_classes as read_classes
    from fastuft.evaluate.inputs import UndefinedError as UndefinedError
    from fastuft.evaluate.looks import Sample as Sample
    from fastuft.evaluate.looks import look_at as look_at
    from fastuft.evaluate.prototypes import prototype_accuracy as prototype_accuracy
    from fastuft.evaluate.retrieval import nearest_neighbors as nearest_neighbors
    from fastuft.evaluate.retrieval import retrieval_accuracy as retrieval_accuracy
    from fastuft.evaluate.semi_supervised import FixMatchResult as FixMatchResult
    from fastuft.evaluate.semi_supervised import fixmatch as fixmatch
    from fastuft.evaluate.unlabeled import alignment as alignment
    from fastuft.evaluate.unlabeled import effective_rank as effective_rank
    from fastuft.evaluate.unlabeled import lidar as lidar
    from fastuft.evaluate.unlabeled import linear_cka as linear_cka
    from fastuft.evaluate.unlabeled import mean_cosine as mean_cosine
    from fastuft.evaluate.unlabeled import neighbor_overlap as neighbor_overlap
    from fastuft.evaluate.unlabeled import uniformity as uniformity
    from fastuft.evaluate.unlabeled import view_agreement as view_agreement
    from fastuft.evaluate.verdict import Look as Look
    from fastuft.evaluate.verdict import Rule as Rule
    from fastuft.evaluate.verdict import Verdict as Verdict
    from fastuft.evaluate.verdict import best_look as best_look
    from fastuft.evaluate.verdict import judge as judge
    from fastuft.evaluate.verdict import should_stop as should_stop


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastuft.evaluate' has no attribute {name!r}")
    value = getattr(import_module(f"fastuft.evaluate.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


class _Room(ModuleType):
    """Makes this package callable, because ``fastuft.evaluate(...)`` is a call of the Python interface."""

    def __call__(self, **options: Any) -> Any:
        return import_module("fastuft.api").evaluate(**options)


sys.modules[__name__].__class__ = _Room
