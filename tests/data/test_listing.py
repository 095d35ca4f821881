"""Finding the images of folders: links and large trees."""

from __future__ import annotations

import os
import time

import pytest

from fastuft.data import Manifest, list_images


def test_links_are_followed_but_not_for_ever(tmp_path, manifest):
    (tmp_path / "a" / "b").mkdir(parents=True)
    os.link(manifest.paths[0], tmp_path / "a" / "b" / "one.png")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "a" / ".hidden").mkdir()
    os.link(manifest.paths[0], tmp_path / "a" / ".hidden" / "two.png")
    (tmp_path / "other").symlink_to(os.path.dirname(manifest.paths[0]))
    assert len(list_images(str(tmp_path))) == 1 + 20


@pytest.mark.slow
def test_a_large_tree_is_scanned_quickly_and_cached(tmp_path, monkeypatch):
    """Rates for 100,000 files, printed; a million at this rate takes well under a minute."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in range(100):
        place = tmp_path / "tree" / f"n{folder:08d}"
        place.mkdir(parents=True)
        for index in range(1000):
            os.close(os.open(place / f"{index:06d}.JPEG", os.O_CREAT | os.O_WRONLY))
    seconds, busy = [], []
    for _ in range(2):
        begin, begin_busy = time.perf_counter(), time.process_time()
        files = list_images(str(tmp_path / "tree"))
        seconds.append(time.perf_counter() - begin)
        busy.append(time.process_time() - begin_busy)
        assert len(files) == 100_000 and files == sorted(files)
    rates = [
        f"{1e5 / s:,.0f} files/s ({1e5 / b:,.0f} a second of processor time)"
        for s, b in zip(seconds, busy, strict=True)
    ]
    print(f"scan {rates[0]}, cached {rates[1]}")
    assert busy[0] < 2 and seconds[0] < 6  # a million in a minute, whatever else the machine does
    assert busy[1] < busy[0]
    begin = time.perf_counter()
    built = Manifest.build(files[0], str(tmp_path / "tree"), fraction=0.1)
    print(f"manifest of the tree: {time.perf_counter() - begin:.1f} s")
    assert built.num_source == 10_000
    (tmp_path / "tree" / "n00000007" / "new.jpg").touch()
    assert len(list_images(str(tmp_path / "tree"))) == 100_001


@pytest.mark.parametrize("make_path", [lambda p: p / "nowhere", lambda p: p])
def test_missing_and_empty_folders_are_named(tmp_path, make_path):
    with pytest.raises(ValueError, match=str(make_path(tmp_path))):
        list_images(str(make_path(tmp_path)))


def test_list_files_name_paths_relative_to_themselves(folders, tmp_path):
    paths = list_images(folders[0])[:3]
    (tmp_path / "list.txt").write_text("# a comment\n" + "\n".join(paths) + "\n\n")
    assert list_images(str(tmp_path / "list.txt")) == paths
