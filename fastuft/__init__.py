"""fastuft: unsupervised finetuning of pretrained image backbones, and its fused loss for other projects.

``import fastuft`` needs only torch and is fast: every public name is imported on first use, so Triton,
DALI and the compiled extension are loaded only by what needs them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastuft.version import VERSION as __version__

_EXPORTS = {
    "info_nce": "fastuft.loss",
    "mixed_info_nce": "fastuft.loss",
    "InfoNCELoss": "fastuft.loss",
    "MixedInfoNCELoss": "fastuft.loss",
    "queue_lse": "fastuft.loss",
    "KeyQueue": "fastuft.loss",
    "cutmix": "fastuft.mix",
    "cutmix_": "fastuft.mix",
    "mixup": "fastuft.mix",
    "mixup_": "fastuft.mix",
    "sample_boxes": "fastuft.mix",
    "bcubed_precision": "fastuft.evaluate",
    "retrieval_accuracy": "fastuft.evaluate",
    "load_backbone": "fastuft.api",
    "finetune": "fastuft.api",
    "embed": "fastuft.api",
    "export": "fastuft.api",
}


def _has_numpy() -> bool:
    try:
        return find_spec("numpy") is not None
    except ModuleNotFoundError:
        return False


# ``from fastuft import *`` works with only torch: the metrics, which need NumPy, are left out if it is missing.
_STARRED = [name for name, room in _EXPORTS.items() if room != "fastuft.evaluate" or _has_numpy()]
__all__ = ["__version__", "evaluate", *_STARRED]

if TYPE_CHECKING:  # the redundant aliases mark re-exports for type checkers
    from fastuft.api import embed as embed
    from fastuft.api import evaluate as evaluate
    from fastuft.api import export as export
    from fastuft.api import finetune as finetune
    from fastuft.api import load_backbone as load_backbone
    from fastuft.evaluate import bcubed_precision as bcubed_precision
    from fastuft.evaluate import retrieval_accuracy as retrieval_accuracy
    from fastuft.loss import InfoNCELoss as InfoNCELoss
    from fastuft.loss import KeyQueue as KeyQueue
    from fastuft.loss import MixedInfoNCELoss as MixedInfoNCELoss
    from fastuft.loss import info_nce as info_nce
    from fastuft.loss import mixed_info_nce as mixed_info_nce
    from fastuft.loss import queue_lse as queue_lse
    from fastuft.mix import cutmix as cutmix
    from fastuft.mix import cutmix_ as cutmix_
    from fastuft.mix import mixup as mixup
    from fastuft.mix import mixup_ as mixup_
    from fastuft.mix import sample_boxes as sample_boxes


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # a callable package
        return import_module("fastuft.evaluate")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastuft' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(["__version__", *_EXPORTS])
