"""Time and memory of a source with millions of images: ``python bench/simulate_source.py --images 10000000``.

The shards are empty files of the right length with a matching index, so everything except reading headers and images is real:
loading the indexes, sorting by name, drawing the replayed share, and the digest of names and sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fastuft.data import Manifest
from fastuft.data.caches import cache_folder
from fastuft.data.left_out import IMAGE_SUFFIXES
from fastuft.data.sources.blobs import LocalBlob
from fastuft.data.sources.tar_index import BLOCK, ShardIndex, Texts, keep_index

_BYTES = 110_000  # mean size of an image


def make(root: Path, images: int, shards: int) -> None:
    """Create shards ``root/source/*.tar`` with their indexes in the cache, and a target of one image."""
    (root / "source").mkdir()
    (root / "target").mkdir()
    Image.new("RGB", (8, 8)).save(root / "target" / "photo.png")
    cache, share = cache_folder(), images // shards
    assert cache is not None
    generator = np.random.default_rng(0)
    for shard in range(shards):
        lengths = generator.integers(_BYTES // 2, _BYTES * 3 // 2, share)
        offsets = BLOCK + np.concatenate([[0], np.cumsum(lengths[:-1] + 2 * BLOCK)])
        names = Texts.of([f"n{(shard * share + i) % 21841:08d}/{shard:05d}{i:07d}.jpg".encode() for i in range(share)])
        path = root / "source" / f"{shard:06d}.tar"
        with path.open("wb") as file:
            file.truncate(int(offsets[-1] + lengths[-1]) + 2 * BLOCK)
        keep_index(ShardIndex(offsets, lengths, names), LocalBlob.look(str(path)), IMAGE_SUFFIXES, cache / "shards")


def measure(root: Path) -> dict[str, float]:
    """Build the manifest; returns its time in seconds, the process's memory in MB, and the number of images drawn."""
    unit = 1 << 10  # ru_maxrss counts kB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    began = time.perf_counter()
    manifest = Manifest.build(str(root / "target"), str(root / "source"), fraction=0.1, seed=0)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return {
        "source_images": manifest.source_total,
        "drawn": manifest.num_source,
        "seconds": round(seconds, 1),
        "imports_mb": round(before),
        "held_mb": round(held),
        "peak_mb": round(peak),
    }


def main() -> None:
    """Create the source, then measure it in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        make(Path(folder), options.images, options.shards)
        index = sum(file.stat().st_size for file in (Path(folder) / "cache").rglob("*.npz"))
        subprocess.run([sys.executable, __file__, "--measure", folder], check=True)
        print(json.dumps({"index_mb": round(index / 2**20), "bytes_per_image": round(index / options.images, 1)}))


if __name__ == "__main__":
    main()
