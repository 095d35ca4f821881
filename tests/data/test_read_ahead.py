"""Slow reads: the default pool hides a latency of 50 ms per image, and grows with the rate at which images are used."""

from __future__ import annotations

import math
import time
from functools import partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stream_cases import plain, smooth_picture

from fastuft.data import EvalStream, list_images
from fastuft.data.depth import ReadDepth
from fastuft.data.files import Files
from fastuft.data.images import Images, Located


class Distant(Files):
    """Files with a latency of 50 ms, as in an object store."""

    plain, remote = False, True

    def path(self, row):
        return Located(self.paths[row], self, row)

    def read(self, row):
        time.sleep(0.05)
        return super().read(row)


def distant_of(paths):
    return Images.of([Distant(paths, paths)])


def alternating(measure, paths, rounds):
    """The lowest of several rounds for local and for distant files, because other work on the machine only adds time."""
    best = {"local": math.inf, "distant": math.inf}
    for _ in range(rounds):
        for name, images in (("local", paths), ("distant", distant_of(paths))):
            best[name] = min(best[name], measure(images))
    return best["local"] / best["distant"]


def seconds_at_a_pace(loader, images, pace=1600, batch=32, warm=16):
    """Seconds per image of a consumer that takes 1,600 images per second, as a GPU would; the first batches are not counted."""
    stream = EvalStream(images, loading=plain(loader, threads=1), size=16, batch_size=batch)
    times = []
    for _ in stream:
        times.append(time.perf_counter())
        time.sleep(batch / pace)
    stream.close()
    return (times[-1] - times[warm]) / (len(times) - 1 - warm) / batch


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_a_latency_of_50_ms_does_not_slow_a_fast_consumer(tmp_path, loader):
    """64 threads would give 1,280 images per second. Prints the ratio of the rates."""
    for row in range(32):
        smooth_picture(np.random.default_rng(row), 16, 16).save(tmp_path / f"{row}.png")
    paths = list_images(str(tmp_path)) * 80
    ratio = alternating(partial(seconds_at_a_pace, loader), paths, 3)
    print(f"{loader}: {ratio:.3f} of the local rate")
    assert ratio >= 0.95


def processor_seconds(loader, images):
    stream = EvalStream(images, loading=plain(loader, threads=1), size=224, batch_size=32)
    begin = time.process_time()
    for _ in stream:
        pass
    stream.close()
    return time.process_time() - begin


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_a_latency_of_50_ms_costs_little_processor_time(jpegs, loader):
    """Decoding is limited by processor time. Prints the ratio of the rates per second of processor time of all threads."""
    ratio = alternating(partial(processor_seconds, loader), list(jpegs.paths) * 40, 6)
    print(f"{loader}: {ratio:.3f} of the local rate")
    assert ratio >= 0.95


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_order_does_not_depend_on_the_order_of_reads(jpegs, loader):
    paths = list(jpegs.paths) * 4
    found = [
        torch.cat([made for made, _ in EvalStream(images, loading=plain(loader, threads=1), size=32, batch_size=16)])
        for images in (paths, distant_of(paths))
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_a_fast_consumer_gets_more_reader_threads(jpegs, monkeypatch, loader):
    """64 threads at 50 ms are limited to 1,280 images per second; the number for local files and a given number stay fixed."""
    monkeypatch.setattr("fastuft.data.feed.time", SimpleNamespace(monotonic=count(0, 32 / 1500).__next__))
    paths = list(jpegs.paths) * 12
    for images, readers, expected in ((distant_of(paths), 0, 113), (distant_of(paths), 70, 70), (paths, 0, 16)):
        stream = EvalStream(images, loading=plain(loader, threads=1, readers=readers), size=16, batch_size=32)
        assert sum(len(made) for made, _ in stream) == len(paths)
        assert expected <= stream._feed._pool.workers <= expected * (1.6 if expected == 113 else 1)
        stream.close()


def test_depth_follows_littles_law():
    depth = ReadDepth(64, 256)
    for _ in range(7):
        depth.add(32, 32 * 100_000, 32 / 1500, 0.05)
    assert depth.workers == 64 and depth.batches(32) == 4  # too few batches for an estimate of the rate
    depth.add(32, 32 * 100_000, 32 / 1500, 0.05)
    assert depth.workers == 113 and depth.batches(32) == 8  # 1.5 x 0.05 s x 1,500 images per second
    for _ in range(8):
        depth.add(32, 32 * 100_000, 1.0, 0.05)
    assert depth.workers == 113  # idle threads cost nothing
    for _ in range(8):
        depth.add(32, 32 * 100_000, 32 / 1500, 5.0)
    assert depth.workers == 256
    heavy = ReadDepth(64, 256)
    for _ in range(8):
        heavy.add(32, 32 * 6_000_000, 32 / 1500, 5.0)
    assert heavy.workers == 89  # 2 x 89 images of 6 MB are 1 GiB
