"""Streams on machines with few open files or a /dev/shm of 64 KB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stream_cases import LOADERS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STREAMS = """
import resource, sys
from fastuft.config import DataConfig
from fastuft.data import SMALL_IMAGES, EvalStream, Loading, Manifest, TrainStream, verify_files
root, loader, files = sys.argv[1], sys.argv[2], int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
manifest = Manifest.build(root)
assert verify_files(manifest.paths, decode=True, workers=200) == []
data = DataConfig(batch_size=100, loader=loader, threads=4, prefetch=3)
kind = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
stream = TrainStream(manifest, data, SMALL_IMAGES, loading=Loading.of(data, **kind), seed=5)
print(sum(len(batch.index) for epoch in range(2) for batch in stream.epoch(epoch)))
stream.close()
whole = EvalStream(manifest.paths, loading=Loading(**kind, loader=loader), size=32, batch_size=256)
print(sum(len(images) for images, _ in whole))
whole.close()
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """300 small images in 30 folders."""
    root = tmp_path_factory.mktemp("many")
    for index in range(300):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        path = root / f"{index % 30:02d}" / f"{index:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


@pytest.mark.parametrize("loader", LOADERS)
def test_streams_need_few_open_files(many, loader):
    assert output_of([sys.executable, "-c", STREAMS, str(many), loader, "64"]) == ["600", "300"]


@pytest.mark.parametrize("loader", LOADERS)
def test_streams_need_no_shared_memory(many, loader):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no permission to mount")
    mounts = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mounts, "sh", sys.executable, "-c", STREAMS, str(many), loader, "1024"]
    assert output_of(command) == ["600", "300"]


def output_of(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
