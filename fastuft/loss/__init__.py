"""The fused queue loss and the queue; they need only torch, and Triton on a GPU.

``reference`` has the losses in textbook form, ``portable`` the one-pass algorithm in plain PyTorch, ``fp8`` the 8-bit rows of a
queue, ``ops`` the registered operators, ``functional`` the public functions, ``lightly`` a drop-in for that library's loss.
"""

from fastuft.loss.functional import (
    info_nce,
    info_nce_with_terms,
    mixed_info_nce,
    mixed_info_nce_with_terms,
    queue_lse,
)
from fastuft.loss.modules import InfoNCELoss, MixedInfoNCELoss
from fastuft.loss.options import LossOptions
from fastuft.loss.queue import KeyQueue

__all__ = [
    "InfoNCELoss",
    "KeyQueue",
    "LossOptions",
    "MixedInfoNCELoss",
    "info_nce",
    "info_nce_with_terms",
    "mixed_info_nce",
    "mixed_info_nce_with_terms",
    "queue_lse",
]
