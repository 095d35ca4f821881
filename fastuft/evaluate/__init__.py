"""What a representation is worth: the paper's metrics over features, few-shot finetuning, and a label-free report.

Every function takes features, labels or a backbone module, never a trainer. Metrics are fractions in [0, 1]; only
reports turn them into per cent.
"""

from fastuft.evaluate.accuracy import mean_class_accuracy, top1_accuracy
from fastuft.evaluate.clustering import KMeans, bcubed_precision, clustering_accuracy, kmeans
from fastuft.evaluate.retrieval import nearest_neighbours, retrieval_accuracy
from fastuft.evaluate.unlabelled import (
    alignment,
    alignment_uniformity,
    drift,
    linear_cka,
    neighbour_overlap,
    uniformity,
)

__all__ = [
    "KMeans",
    "alignment",
    "alignment_uniformity",
    "bcubed_precision",
    "clustering_accuracy",
    "drift",
    "kmeans",
    "linear_cka",
    "mean_class_accuracy",
    "nearest_neighbours",
    "neighbour_overlap",
    "retrieval_accuracy",
    "top1_accuracy",
    "uniformity",
]
