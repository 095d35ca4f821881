"""The configuration that a run uses: options left to the program are replaced with what it chose."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from fastuft.config import TrainConfig
from fastuft.data import Loading, resolve_loader
from fastuft.device import queue_dtype_name
from fastuft.trainer.learner import Learner


def resolved_config(
    config: TrainConfig, learner: Learner, loading: Loading, init_report: Mapping[str, Any] | None
) -> TrainConfig:
    """The configuration with ``auto`` and 0 replaced by the values in use.

    These are device, precision, dtype of the queue, BatchNorm mode, loader, threads, and the channels and pooling of the
    checkpoint that the run started from.

    Args:
        config: the configuration as it was given.
        learner: the learner built from it.
        loading: how images are loaded on this rank.
        init_report: the report on the checkpoint that the run started from, or None.
    """
    bn = config.model.bn
    if bn == "auto":
        bn = "plain" if learner.bn == "none" else learner.bn  # networks without BatchNorm ignore it
    device = learner.ranks.device
    loader = resolve_loader(loading.loader)
    return dataclasses.replace(
        config,
        init_channels=init_report["channels"] if init_report else config.init_channels,
        model=dataclasses.replace(config.model, bn=bn, pool=learner.moco.query_encoder.backbone.traits.pool),
        method=dataclasses.replace(config.method, queue_dtype=queue_dtype_name(learner.queue.dtype)),
        data=dataclasses.replace(config.data, loader=loader, threads=loading.num_threads),
        runtime=dataclasses.replace(
            config.runtime, device="cuda" if device.type == "cuda" else "cpu", precision=learner.precision
        ),
    )


def plain(config: TrainConfig) -> dict[str, Any]:
    """A configuration as it is read from a file: nested mappings, with lists for tuples."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values
