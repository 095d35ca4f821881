"""All results of the paper with one command: data sets, the grid of runs, and the side-by-side tables."""

from fastuft.reproduce.datasets import DatasetMissing, PreparedDataset, Sizes, prepare_dataset
from fastuft.reproduce.runner import reproduce
from fastuft.reproduce.shards import extract_tar_sample
from fastuft.reproduce.tiny import write_tiny_datasets

__all__ = [
    "DatasetMissing",
    "PreparedDataset",
    "Sizes",
    "extract_tar_sample",
    "prepare_dataset",
    "reproduce",
    "write_tiny_datasets",
]
