"""The MoCoV2 trainer with sparse source data replaying and data mixing."""

from fastuft.trainer.distributed import LostRankError
from fastuft.trainer.learner import resolve_bn
from fastuft.trainer.run import NonFiniteLossError, RunResult, train
from fastuft.trainer.signals import EXIT_PREEMPTED
from fastuft.trainer.state import CheckpointError

__all__ = [
    "EXIT_PREEMPTED",
    "CheckpointError",
    "LostRankError",
    "NonFiniteLossError",
    "RunResult",
    "resolve_bn",
    "train",
]
