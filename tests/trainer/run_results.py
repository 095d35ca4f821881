"""Results of a run, from its folder."""

from __future__ import annotations

import json

import torch

from fastuft.model import load_backbone
from fastuft.runfolder import RunFolder, load_checkpoint

_CLOCK = ("time", "images_per_second", "seconds_per_step", "data_wait_share", "seconds")


def rows(folder, kind="train"):
    """The rows of one kind in metrics.jsonl, without values that depend on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in _CLOCK} for row in found if row["kind"] == kind]


def final(folder):
    """The state in the newest checkpoint."""
    return load_checkpoint(RunFolder(folder).checkpoints.all()[0][1])


def assert_same_state(left, right):
    for part in ("model", "queue", "optimizer", "scaler", "rank_buffers", "torch_rng"):
        torch.testing.assert_close(left[part], right[part], rtol=0, atol=0, equal_nan=True)
    assert all(left[name] == right[name] for name in ("epoch", "step", "global_step", "images"))


def same_weights(one, other):
    left, right = (load_backbone(file).state_dict() for file in (one, other))
    return all(torch.equal(value, right[name]) for name, value in left.items())
