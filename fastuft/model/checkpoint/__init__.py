"""Checkpoints in and out: what a file is, what it holds, where in it a backbone is, and how others want it."""

from fastuft.model.checkpoint.conversion import Channels, traits_from
from fastuft.model.checkpoint.exporting import export, export_backbone, export_state_dict
from fastuft.model.checkpoint.loading import InitReport, load_backbone, load_init, open_backbone
from fastuft.model.checkpoint.reading import read_checkpoint

__all__ = [
    "Channels",
    "InitReport",
    "export",
    "export_backbone",
    "export_state_dict",
    "load_backbone",
    "load_init",
    "open_backbone",
    "read_checkpoint",
    "traits_from",
]
