"""The MoCoV2 trainer with sparse source data replaying and data mixing."""

from fastuft.runfolder import CheckpointError
from fastuft.trainer.averaging import StartAverage
from fastuft.trainer.distributed import LostRankError
from fastuft.trainer.finite import NonFiniteLossError
from fastuft.trainer.learner_setup import resolve_bn
from fastuft.trainer.run import Callbacks, RunResult, train
from fastuft.trainer.signals import EXIT_PREEMPTED, under_torchelastic

__all__ = [
    "EXIT_PREEMPTED",
    "Callbacks",
    "CheckpointError",
    "LostRankError",
    "NonFiniteLossError",
    "RunResult",
    "StartAverage",
    "resolve_bn",
    "train",
    "under_torchelastic",
]
