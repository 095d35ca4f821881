"""Local copies of replayed images: changed originals, broken disks, kills and several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from fastuft.data import Manifest


@pytest.fixture
def replayed(manifest, tmp_path):
    """A target and six source images; ``build`` makes the manifest and returns the paths of the source."""
    for name in ("originals", "target"):
        (tmp_path / name).mkdir()
    for path in manifest.paths[:6]:
        os.link(path, tmp_path / "originals" / os.path.basename(path))
    os.link(manifest.paths[7], tmp_path / "target" / "x.png")

    def build(cache=tmp_path / "cache"):
        folders = str(tmp_path / "target"), str(tmp_path / "originals")
        return Manifest.build(*folders, fraction=1.0, replay_cache=str(cache)).paths[1:]

    return types.SimpleNamespace(originals=tmp_path / "originals", cache=tmp_path / "cache", build=build)


def test_the_replay_cache_follows_changed_originals_and_survives_a_truncated_index(replayed):
    copies = replayed.build()
    stamps = [os.stat(path).st_mtime_ns for path in copies]
    changed = replayed.originals / "02.png"
    changed.unlink()
    changed.write_bytes(b"x" * 2000)
    index = replayed.cache / "index.jsonl"
    index.write_text(index.read_text() + '["cut off')
    for _ in range(2):  # entries after the truncated line are found again
        assert replayed.build() == copies
        again = [os.stat(path).st_mtime_ns for path in copies]
        assert [a != b for a, b in zip(stamps, again, strict=True)] == [False, False, True, False, False, False]
        index_lines = index.read_text().splitlines()
    assert len(index_lines) == 6 + 1 + 1  # the first copies, the cut line, the changed one
    assert Path(copies[2]).read_bytes() == b"x" * 2000


def test_a_copy_that_differs_or_cannot_be_written_stops_and_names_the_file(replayed, monkeypatch):
    whole = Path.read_bytes

    def flaky(self):
        return whole(self)[:-1] if self.name.endswith(".partial") else whole(self)

    monkeypatch.setattr(Path, "read_bytes", flaky)
    with pytest.raises(ValueError, match=r"data.replay_cache=.*0\d\.png cannot be copied \(the copy differs"):
        replayed.build()
    assert [path.name for path in replayed.cache.iterdir() if path.suffix == ".png"] == []
    monkeypatch.undo()
    assert [Path(path).read_bytes() for path in replayed.build()] == [
        path.read_bytes() for path in sorted(replayed.originals.iterdir())
    ]
    assert not list(replayed.cache.glob("*.partial"))

    def full(self, content):
        raise OSError(28, "No space left on device")

    (replayed.originals / "03.png").touch()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"03\.png cannot be copied \(No space left on device\); free some disk space"):
        replayed.build()


def test_a_replay_cache_that_cannot_be_a_folder_is_refused(replayed):
    with pytest.raises(ValueError, match=r"data.replay_cache='.*02\.png' cannot be written .*name a folder"):
        replayed.build(replayed.originals / "02.png")


def test_an_unreadable_original_follows_on_bad_file(replayed):
    (replayed.originals / "04.png").unlink()
    (replayed.originals / "04.png").symlink_to("nowhere.png")
    paths = replayed.build()
    assert paths[4] == str(replayed.originals / "04.png") and str(replayed.cache) in paths[5]


COPIER = """
import sys
from fastuft.data import Manifest
print("ready", flush=True)
sys.stdin.readline()
Manifest.build(sys.argv[1], sys.argv[2], fraction=1.0, replay_cache=sys.argv[3])
"""


@pytest.mark.slow
def test_the_replay_cache_survives_kills_and_is_shared_by_ranks(tmp_path):
    """A process is killed repeatedly while it copies; then three processes finish at once, and each file is copied by one."""
    generator = np.random.default_rng(0)
    for folder, count in (("target", 1), ("source", 3000)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            (tmp_path / folder / f"{index:04d}.png").write_bytes(generator.bytes(20_000))
    cache = tmp_path / "cache"

    def start():
        arguments = [str(tmp_path / "target"), str(tmp_path / "source"), str(cache)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", COPIER, *arguments], **pipes)
        assert process.stdout.readline() == "ready\n"
        return process

    def go(process):
        process.stdin.write("\n")
        process.stdin.flush()

    def copied():
        return len((cache / "index.jsonl").read_text().splitlines()) if (cache / "index.jsonl").exists() else 0

    for wanted in (200, 700, 1500):
        process = start()
        go(process)
        while copied() < wanted and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert wanted <= copied() < 3000
    processes = [start() for _ in range(3)]
    for process in processes:
        go(process)
    assert [process.wait() for process in processes] == [0, 0, 0]
    lines = (cache / "index.jsonl").read_text().splitlines()
    assert 3000 <= len(lines) <= 3000 + 3  # a kill may cut a line off
    manifest = Manifest.build(str(tmp_path / "target"), str(tmp_path / "source"), fraction=1.0, replay_cache=str(cache))
    for original, copy in zip(sorted((tmp_path / "source").iterdir()), manifest.paths[1:], strict=True):
        assert Path(copy).parent == cache and Path(copy).read_bytes() == original.read_bytes()


def test_the_replay_cache_copies_once_and_resumes(folders, tmp_path):
    cache = tmp_path / "cache"
    first = Manifest.build(*folders, fraction=0.3, replay_cache=str(cache))
    copies = [path for path in first.paths if path.startswith(str(cache))]
    assert len(copies) == 27
    stamps = {path: (cache / path).stat().st_mtime_ns for path in copies}
    (cache / copies[0]).write_bytes(b"cut")
    again = Manifest.build(*folders, fraction=0.3, replay_cache=str(cache))
    assert again.paths == first.paths
    changed = [path for path in copies if (cache / path).stat().st_mtime_ns != stamps[path]]
    assert changed == copies[:1]
