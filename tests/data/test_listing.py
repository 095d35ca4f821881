"""Listing folders: links, other files, large trees."""

from __future__ import annotations

import os
import time

import pytest

from fastuft import messages
from fastuft.data import Manifest, labeled_folder, list_images


def test_links_are_followed_without_loops(tmp_path, manifest):
    (tmp_path / "a" / "b").mkdir(parents=True)
    os.link(manifest.paths[0], tmp_path / "a" / "b" / "one.png")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "a" / ".hidden").mkdir()
    os.link(manifest.paths[0], tmp_path / "a" / ".hidden" / "two.png")
    (tmp_path / "other").symlink_to(os.path.dirname(manifest.paths[0]))
    assert len(list_images(str(tmp_path))) == 1 + 20


def test_a_root_behind_a_link_with_a_link_inside_is_read_once(tmp_path, manifest):
    (tmp_path / "real" / "inner").mkdir(parents=True)
    os.link(manifest.paths[0], tmp_path / "real" / "inner" / "one.png")
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real" / "inner")
    (tmp_path / "link").symlink_to("real")
    for root in ("real", "link"):
        assert len(list_images(str(tmp_path / root))) == 1


def test_a_link_to_itself_is_not_a_folder(tmp_path, manifest):
    os.link(manifest.paths[0], tmp_path / "one.png")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert list_images(str(tmp_path / "one.png")) == [str(tmp_path / "one.png")]
    assert [os.path.basename(path) for path in list_images(str(tmp_path))] == ["loop.png", "one.png"]


@pytest.fixture
def mixed(tmp_path, manifest, monkeypatch):
    """Images, other files, and folders that systems leave behind."""
    monkeypatch.setattr(messages, "_said", set())
    for folder in ("cats", "cats/__MACOSX", "@eaDir", ".ipynb_checkpoints"):
        (tmp_path / folder).mkdir(exist_ok=True)
        os.link(manifest.paths[0], tmp_path / folder / "one.png")
    for name in ("a.TIF", "b.tif", "c.gif", "raw"):
        (tmp_path / "cats" / name).touch()
    return tmp_path


def test_files_left_out_are_counted_and_named_once(mixed, capsys):
    for _ in range(2):
        assert list_images(str(mixed)) == [str(mixed / "cats" / "one.png")]
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 images; left out: 4 other files (2 .tif, 1 .gif, 1 without a suffix)" in line
    assert line.endswith(
        "1 x the folder @eaDir, 1 x the folder __MACOSX; add other suffixes of images to data.suffixes"
    )


def test_suffixes_select_the_images(mixed):
    found = list_images(str(mixed), (".png", ".tif", ""))
    assert [os.path.basename(path) for path in found] == ["a.TIF", "b.tif", "one.png", "raw"]
    with pytest.raises(ValueError, match=r"suffix 'tif' is not allowed; suffixes begin with a dot"):
        list_images(str(mixed), ("tif",))


def test_hidden_and_system_folders_are_not_classes(mixed):
    assert labeled_folder(str(mixed))[2] == ["cats"]


def test_an_empty_class_is_named(mixed):
    (mixed / "dogs").mkdir()
    with pytest.raises(
        ValueError, match=r"dogs' has no images of its own .* each sub-folder of '.*' is a class, so remove"
    ):
        labeled_folder(str(mixed))


def test_a_linked_image_has_one_class(mixed, manifest, capsys):
    (mixed / "dogs").mkdir()
    os.link(manifest.paths[1], mixed / "dogs" / "two.png")
    os.link(manifest.paths[1], mixed / "beside.png")
    (mixed / "cats" / "up").symlink_to("..")
    paths, labels, names = labeled_folder(str(mixed))
    assert (labels, names) == ([0, 1], ["cats", "dogs"])
    assert paths == [str(mixed / "cats" / "one.png"), str(mixed / "dogs" / "two.png")]
    assert "1 images beside the class folders are left out" in capsys.readouterr().err
    (mixed / "felines").symlink_to("cats")
    with pytest.raises(ValueError, match=r"felines' has no images of its own"):
        labeled_folder(str(mixed))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ValueError, match=r"the folder '.*closed' cannot be read \(Permission denied\); fix its"):
        list_images(str(tmp_path))


def test_a_folder_that_fails_during_a_scan_is_named(mixed, monkeypatch):
    whole = os.scandir

    def failing(folder):
        if os.path.basename(folder) == "cats":
            raise PermissionError(13, "Permission denied")
        return whole(folder)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(ValueError, match=r"the folder '.*cats' cannot be read \(Permission denied\); fix its"):
        list_images(str(mixed))


def test_names_with_control_characters_are_shown_as_escapes(tmp_path):
    with pytest.raises(ValueError, match=r"a\\x1b\[2J' does not exist"):
        list_images(str(tmp_path / "a\x1b[2J"))


def test_listing_works_without_a_home(mixed, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr("fastuft.data.listing._SCAN_CACHE_FROM", 1)
    assert len(list_images(str(mixed))) == 1


@pytest.mark.slow
def test_a_large_tree_is_scanned_quickly_and_cached(tmp_path, monkeypatch):
    """Prints the rates for 100,000 files; a million at this rate takes well under a minute."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in range(100):
        inner = tmp_path / "tree" / f"n{folder:08d}"
        inner.mkdir(parents=True)
        for index in range(1000):
            os.close(os.open(inner / f"{index:06d}.JPEG", os.O_CREAT | os.O_WRONLY))
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
