"""Loading and exporting checkpoints: recognizing a file, reading it, finding a backbone in it, and other layouts.

A layout is a table of names in resnet_layouts.py or transformer_layouts.py, which is enough to load and to export it.
"""

from fastuft.model.checkpoint.conversion import Channels, traits_from
from fastuft.model.checkpoint.exporting import export, export_backbone, export_state_dict
from fastuft.model.checkpoint.init_report import InitReport
from fastuft.model.checkpoint.loading import load_backbone, load_init, named_network, open_backbone
from fastuft.model.checkpoint.reading import read_checkpoint

__all__ = [
    "Channels",
    "InitReport",
    "export",
    "export_backbone",
    "export_state_dict",
    "load_backbone",
    "load_init",
    "named_network",
    "open_backbone",
    "read_checkpoint",
    "traits_from",
]
