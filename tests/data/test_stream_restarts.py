"""Pixels do not depend on ranks, restarts and kills; streams can be abandoned and their batches held."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from stream_cases import LOADERS, small_stream, stream_of

from fastuft.config import DataConfig


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("mode", ["union", "balanced"])
def test_ranks_take_disjoint_slices_with_the_same_pixels(manifest, loader, mode):
    """For one to eight ranks with different numbers of threads, the slices of a step make up the global batch."""
    changes = {"replay_mode": mode, "replay_share": 0.25} if mode == "balanced" else {}

    def batches(rank, world_size):
        data = DataConfig(batch_size=8, loader=loader, threads=1 + rank % 3, **changes)
        return list(stream_of(manifest, data, seed=5, rank=rank, world_size=world_size).epoch(3))

    whole = batches(0, 1)
    assert len(whole) == (4 if mode == "union" else 3)
    for world_size in (2, 4, 8):
        ranks = [batches(rank, world_size) for rank in range(world_size)]
        for step, batch in enumerate(whole):
            for name in ("query", "key", "index", "is_source"):
                parts = [getattr(rank[step], name) for rank in ranks]
                assert {len(part) for part in parts} == {8 // world_size}
                assert torch.equal(torch.cat(parts), getattr(batch, name))


@pytest.mark.parametrize("changes", [{}, {"replay_mode": "balanced", "replay_share": 0.5}, {"drop_last": False}])
def test_a_restart_at_any_step_gives_the_same_rows(manifest, changes):
    whole = list(small_stream(manifest, "torch", **changes).epoch(4))
    for start in range(len(whole)):
        rest = list(small_stream(manifest, "torch", **changes).epoch(4, start_step=start))
        assert [batch.step for batch in rest] == list(range(start, len(whole)))
        for ours, theirs in zip(rest, whole[start:], strict=True):
            assert torch.equal(ours.query, theirs.query) and torch.equal(ours.index, theirs.index)


@pytest.mark.parametrize("loader", LOADERS)
def test_held_batches_are_not_overwritten(manifest, loader):
    held = [batch for epoch in range(3) for batch in small_stream(manifest, loader).epoch(epoch)]
    stream = small_stream(manifest, loader)
    held_of_one = [batch for epoch in range(3) for batch in stream.epoch(epoch)]
    for ours, theirs in zip(held_of_one, held, strict=True):
        assert torch.equal(ours.query, theirs.query) and torch.equal(ours.key, theirs.key)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("taken", [1, 3, 4])
def test_an_abandoned_epoch_leaves_nothing_behind(manifest, loader, taken):
    """Also if every batch was taken but the iterator was not exhausted."""
    stream = small_stream(manifest, loader)
    left = stream.epoch(0)
    for _ in range(taken):
        next(left)
    ours, theirs = list(stream.epoch(1)), list(small_stream(manifest, loader).epoch(1))
    assert len(ours) == len(theirs) == 4
    assert all(torch.equal(a.query, b.query) for a, b in zip(ours, theirs, strict=True))
    stream.close()
    stream.close()  # twice does no harm


def test_prefill_and_training_draw_different_views(manifest):
    stream = small_stream(manifest, "torch")
    prefilled = list(stream.prefill(60))
    assert [len(views) for views in prefilled] == [8] * 8
    fresh = list(small_stream(manifest, "torch").epoch(0))
    assert all(torch.equal(a.key, b.key) for a, b in zip(stream.epoch(0), fresh, strict=True))
    assert not any(torch.equal(views, batch.key) for views in prefilled for batch in fresh)


WORKER = """
import json, sys
from fastuft.config import DataConfig
from fastuft.data import SMALL_IMAGES, Loading, Manifest, TrainStream
folder, epochs = sys.argv[1], int(sys.argv[2])
log = open(folder + "/log.jsonl", "a+")
log.seek(0)
done = [json.loads(line) for line in log.read().splitlines() if line.endswith("}")]
epoch, step = (done[-1]["epoch"], done[-1]["step"] + 1) if done else (0, 0)
manifest = Manifest.build(sys.argv[3], sys.argv[4], fraction=0.5)
data = DataConfig(batch_size=8, drop_last=False, threads=1, loader="dali")
loading = Loading.of(data, mean=(0.0,) * 3, std=(1.0,) * 3)
stream = TrainStream(manifest, data, SMALL_IMAGES, loading=loading, seed=0)
for epoch in range(epoch, epochs):
    for batch in stream.epoch(epoch, step):
        digest = float(batch.query.double().sum() + batch.key.double().sum())
        row = {"epoch": epoch, "step": batch.step, "index": batch.index.tolist(), "digest": digest}
        log.write(json.dumps(row) + "\\n")
        log.flush()
    step = 0
"""


@pytest.mark.slow
def test_repeated_kills_cover_every_epoch_exactly(manifest, tmp_path):
    """200 epochs in a process that is killed every few epochs and resumed: each image once per epoch, pixels as in an
    uninterrupted run.
    """
    folders = [os.path.dirname(manifest.paths[row]) for row in (0, -1)]
    (tmp_path / "log.jsonl").touch()
    generator = random.Random(0)
    epochs, kills = 200, 0

    def rows():
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    while True:
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(epochs), *folders])
        stop_at = len(rows()) + generator.randint(20, 60)
        while worker.poll() is None and len(rows()) < stop_at:
            time.sleep(0.002)
        if worker.poll() is not None:
            assert worker.returncode == 0
            break
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        kills += 1
        text = (tmp_path / "log.jsonl").read_text()
        (tmp_path / "log.jsonl").write_text(text[: text.rfind("\n") + 1])  # a checkpoint is whole or not there
    seen = {epoch: [] for epoch in range(epochs)}
    for row in rows():
        seen[row["epoch"]] += row["index"]
    assert all(sorted(indices) == list(range(35)) for indices in seen.values())
    assert kills >= 15
    stream = small_stream(manifest, drop_last=False)
    by_step = {(row["epoch"], row["step"]): row["digest"] for row in rows()}
    stream.seed = 0
    for epoch in range(0, epochs, 10):
        for batch in stream.epoch(epoch):
            digest = float(batch.query.double().sum() + batch.key.double().sum())
            assert by_step[epoch, batch.step] == digest
