"""CutMix and MixUp on batches: a C++/CUDA extension, with a plain PyTorch reference beside it."""

from fastuft.mix.boxes import sample_boxes, sample_lambda
from fastuft.mix.functional import cutmix, cutmix_, mixup, mixup_

__all__ = ["cutmix", "cutmix_", "mixup", "mixup_", "sample_boxes", "sample_lambda"]
