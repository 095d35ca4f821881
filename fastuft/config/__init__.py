"""The options of fastuft: trees of frozen dataclasses that need only the standard library.

Each command has a file with its tree (training, evaluation, embedding, reproduction), and each group of training options
has one named like it: ``--optim.lr`` is in optim.py.

``--help`` shows the field docstrings. A field's annotation holds its allowed values, and ``__post_init__`` checks
combinations of fields, so an impossible configuration is refused before any work starts.
"""

from fastuft.config.checks import (
    AUTO,
    AtLeast0,
    AtLeast1,
    Fraction,
    NonNegative,
    PathName,
    Paths,
    Positive,
    Range,
    Span,
    as_paths,
    check_choice,
    check_range,
    check_values,
    is_auto,
)
from fastuft.config.data import AugmentConfig, DataConfig
from fastuft.config.embedding import EmbedConfig, SearchConfig
from fastuft.config.evaluation import ClusteringConfig, EvalConfig, FewShotConfig, MapConfig, SemiConfig
from fastuft.config.method import MethodConfig, Mix
from fastuft.config.model import BatchNormMode, ModelConfig
from fastuft.config.optim import OptimConfig
from fastuft.config.presets import Family, family_of, preset_options
from fastuft.config.reproduction import DATASETS, FIGURES, TABLES, ReproduceConfig, WeightsConfig
from fastuft.config.runtime import RuntimeConfig
from fastuft.config.training import AUTO_OPTIONS, NETWORK_OPTIONS, TrainConfig
from fastuft.config.watch import VerdictConfig, WatchConfig

__all__ = [
    "AUTO",
    "AUTO_OPTIONS",
    "DATASETS",
    "FIGURES",
    "NETWORK_OPTIONS",
    "TABLES",
    "AtLeast0",
    "AtLeast1",
    "AugmentConfig",
    "BatchNormMode",
    "ClusteringConfig",
    "DataConfig",
    "EmbedConfig",
    "EvalConfig",
    "Family",
    "FewShotConfig",
    "Fraction",
    "MapConfig",
    "MethodConfig",
    "Mix",
    "ModelConfig",
    "NonNegative",
    "OptimConfig",
    "PathName",
    "Paths",
    "Positive",
    "Range",
    "ReproduceConfig",
    "RuntimeConfig",
    "SearchConfig",
    "SemiConfig",
    "Span",
    "TrainConfig",
    "VerdictConfig",
    "WatchConfig",
    "WeightsConfig",
    "as_paths",
    "check_choice",
    "check_range",
    "check_values",
    "family_of",
    "is_auto",
    "preset_options",
]
