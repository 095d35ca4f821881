"""Which image stands where: the epoch's order is a pure function of (seed, epoch)."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastuft.randomness import keyed_generator

Positions = np.ndarray[Any, np.dtype[np.int64]]


def steps_in_epoch(num_target: int, num_source: int, batch: int, *, mode: str, share: float, drop_last: bool) -> int:
    """Batches of one epoch; see :func:`epoch_order`."""
    if mode == "balanced":
        total, each = num_target, batch - source_rows(batch, share)
    else:
        total, each = num_target + num_source, batch
    return total // each if drop_last else -(-total // each)


def source_rows(batch: int, share: float) -> int:
    """Source images in each batch of balanced replay; at least one of either kind."""
    return min(max(round(share * batch), 1), batch - 1)


def epoch_order(
    num_target: int, num_source: int, batch: int, *, seed: int, epoch: int, mode: str, share: float, drop_last: bool
) -> Positions:
    """Manifest positions of one epoch in the order of training, int64 [images].

    union: one shuffled pass over target and replayed source. balanced: one shuffled pass over the target with
    ``source_rows`` source images in every batch, which come from consecutive shuffled passes over the source; rows are
    shuffled within a batch, so that pairs of rows are not always one of each. With ``drop_last`` the last partial batch
    is left out: a different remainder each epoch.
    """
    steps = steps_in_epoch(num_target, num_source, batch, mode=mode, share=share, drop_last=drop_last)
    if mode == "union":
        order = keyed_generator(seed, "order", epoch).permutation(num_target + num_source)
        return order[: steps * batch] if drop_last else order
    from_source = source_rows(batch, share)
    from_target = batch - from_source
    targets = keyed_generator(seed, "order", epoch).permutation(num_target)
    # The source goes on where the epoch before stopped: passes are numbered through the whole training.
    first = epoch * steps * from_source
    passes = range(first // num_source, -(-(first + steps * from_source) // num_source))
    cycle = np.concatenate([keyed_generator(seed, "source order", p).permutation(num_source) for p in passes])
    start = first % num_source
    sources = num_target + cycle[start : start + steps * from_source]
    shuffle = keyed_generator(seed, "rows", epoch)
    batches = []
    for step in range(steps):
        rows = np.concatenate(
            [
                targets[step * from_target : (step + 1) * from_target],
                sources[step * from_source : (step + 1) * from_source],
            ]
        )
        batches.append(rows[shuffle.permutation(len(rows))])
    return np.concatenate(batches)
