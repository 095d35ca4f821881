"""The commands as Python calls: the same options, checks, code and files."""

from fastuft.api.calls import embed, evaluate, export, finetune, load_backbone
from fastuft.api.run import Run

__all__ = ["Run", "embed", "evaluate", "export", "finetune", "load_backbone"]
