"""Filling the queue before the first step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch

from fastuft.data import Manifest, TrainStream
from fastuft.trainer.distributed import gather_rows
from fastuft.trainer.learner import Learner

_SAY_EVERY = 5.0  # seconds


def prefill(
    learner: Learner, stream: TrainStream, manifest: Manifest, stop: Callable[[], bool], say: Callable[[str], None]
) -> bool:
    """Fill the queue with keys of training images, because random rows are useless negatives for a trained network.

    Args:
        learner: its queue is filled.
        stream: the images.
        manifest: the list of images that ``stream`` draws from.
        stop: called after each batch on every rank; returns whether to stop.
        say: prints a line for the user about the progress and the time left.

    Returns:
        Whether ``stop`` ended it.
    """
    size = missing = learner.method.queue_size
    if missing > len(manifest) and learner.ranks.is_main:
        warnings.warn(
            f"method.queue_size={missing} exceeds the {len(manifest)} training images, so the queue has several keys of "
            "each image, and an image meets its own older keys as negatives; a smaller queue avoids this",
            stacklevel=2,
        )
    began = last = time.monotonic()
    for views in stream.prefill(missing):
        with torch.no_grad(), learner.autocast():
            keys = gather_rows(learner.key(views), learner.ranks)
        # Batches are encoded whole and cut only here, so statistics groups are the same on any number of ranks.
        learner.queue.enqueue_(keys[:missing])
        missing -= len(keys)
        now = time.monotonic()
        if now - last > _SAY_EVERY and missing > 0:
            last = now
            left = (now - began) * missing / (size - missing)
            say(f"filling the queue: {size - missing:,} of {size:,} keys, {left / 60:.1f} min left")
        if stop():
            return True
    return False
