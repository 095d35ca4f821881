"""A run folder: the names of its files, and how each is written, read and checked. Reading does not need torch."""

from fastuft.runfolder.checkpoints import CheckpointError, Checkpoints, load_checkpoint
from fastuft.runfolder.folder import RunFolder
from fastuft.runfolder.lock import FolderInUseError, FolderLostError, RunLock
from fastuft.runfolder.progress import Progress
from fastuft.runfolder.records import json_lines, read_json, read_json_lines, write_json
from fastuft.runfolder.sealed import UNSEALED, damage, seal

__all__ = [
    "UNSEALED",
    "CheckpointError",
    "Checkpoints",
    "FolderInUseError",
    "FolderLostError",
    "Progress",
    "RunFolder",
    "RunLock",
    "damage",
    "json_lines",
    "load_checkpoint",
    "read_json",
    "read_json_lines",
    "seal",
    "write_json",
]
