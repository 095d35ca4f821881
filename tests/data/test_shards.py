"""Tar shards: the same images, order, pixels and identity as the folder that they unpack to."""

from __future__ import annotations

import os
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_cases import contents, pack, write_tar
from stream_cases import LOADERS, assert_ranks_make_the_batches, plain, stream_of

from fastuft import messages
from fastuft.config import DataConfig
from fastuft.data import (
    BadImageError,
    EvalStream,
    Manifest,
    labeled_folder,
    list_images,
    open_rgb,
    read_bytes,
    verify_files,
)
from fastuft.data.sources import tar_index


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setattr(messages, "_said", set())
    return tmp_path / "user-cache" / "fastuft" / "shards"


@pytest.fixture(scope="module")
def shards(folders, tmp_path_factory):
    shard_file = tmp_path_factory.mktemp("shards")
    return pack(folders[0], shard_file / "target", "t", 3), pack(folders[1], shard_file / "source", "s", 4)


def build(locations, **options):
    return Manifest.build(*locations, **{"fraction": 0.3, "seed": 1, **options})


def test_names_sizes_and_order_equal_the_folder(folders, shards):
    ours, theirs = list_images(shards[1]), list_images(folders[1])
    assert [path.split(".tar/")[1] for path in ours] == [os.path.relpath(path, folders[1]) for path in theirs]
    assert [read_bytes(path) for path in ours] == [Path(path).read_bytes() for path in theirs]
    assert build(shards).content_hash == build(folders).content_hash
    assert build(shards).summary() == build(folders).summary()


@pytest.mark.parametrize("loader", LOADERS)
def test_pixels_order_and_restarts_equal_the_folder_for_any_ranks(folders, shards, loader):
    def batches(locations, rank=0, world_size=1, start=0):
        data = DataConfig(batch_size=16, loader=loader, threads=1 + rank % 2)
        stream = stream_of(build(locations), data, seed=3, rank=rank, world_size=world_size)
        return list(stream.epoch(1, start))

    whole = batches(folders)
    for world_size in (1, 2, 4):
        ranks = [batches(shards, rank, world_size) for rank in range(world_size)]
        assert_ranks_make_the_batches(whole, ranks)
    rest = batches(shards, start=2)
    assert len(rest) == len(whole) - 2 and torch.equal(rest[0].query, whole[2].query)


@pytest.mark.parametrize("loader", LOADERS)
def test_evaluation_of_shards_equals_the_folder(folders, shards, loader):
    def images(shard_file):
        return torch.cat([views for views, _ in EvalStream(list_images(shard_file), loading=plain(loader), size=32)])

    assert torch.equal(images(shards[0]), images(folders[0]))
    paths, labels, classes = labeled_folder(shards[0])
    _, expected, names = labeled_folder(folders[0])
    assert (labels, classes) == (expected, names)
    assert np.array_equal(open_rgb(paths[5]), open_rgb(labeled_folder(folders[0])[0][5]))
    assert verify_files(paths, decode=True) == []


def test_shards_are_named_by_folder_pattern_or_braces(shards, folders, tmp_path):
    expected = list_images(shards[0])
    folder = os.path.dirname(shards[0])
    (tmp_path / "link").symlink_to(folder)
    moved = shutil.copytree(folder, tmp_path / "moved")
    for text in (folder, f"{folder}/*.tar", f"file://{folder}/t-{{00..02}}.tar", f"{tmp_path}/link/t-0[0-2].tar"):
        assert [path.split(".tar/")[1] for path in list_images(text)] == [path.split(".tar/")[1] for path in expected]
        assert Manifest.build(text).content_hash == Manifest.build(folders[0]).content_hash
    assert Manifest.build(str(moved)).content_hash == Manifest.build(folders[0]).content_hash
    one_by_one = [f"{folder}/t-{n:02d}.tar" for n in range(3)]
    assert sorted(list_images(one_by_one)) == sorted(expected)
    assert len(list_images([folder, f"{folder}/*.tar", one_by_one[0]])) == len(expected)  # each shard once


def test_folders_and_shards_can_be_combined(folders, shards, tmp_path):
    both = list_images([folders[0], shards[1]])
    assert len(both) == 41 + 90 and both[0].startswith(folders[0]) and both[-1].startswith(os.path.dirname(shards[1]))
    assert len(both[40:43]) == 3 and list(both[40:43]) == list(both)[40:43]
    mixed = Manifest.build([folders[0], shards[1]])
    assert mixed.content_hash == Manifest.build(folders).content_hash
    overlapping = Manifest.build(shards[1].replace("{00..03}", "00"), shards[1], fraction=1.0)
    assert len(set(overlapping.paths)) == len(overlapping) == 90  # target images are left out of the source
    with pytest.raises(ValueError, match="has only target images"):
        Manifest.build(shards[0], shards[0])
    mixed.save(tmp_path / "manifest.json")
    assert f'"{both[50]}"' in (tmp_path / "manifest.json").read_text()


def test_the_draw_does_not_touch_the_images(shards, monkeypatch):
    build(shards)  # makes the indexes
    monkeypatch.setattr("fastuft.data.sources.blobs.LocalBlob.read", lambda *_: pytest.fail("reads"))
    assert build(shards).num_source == 27


def test_the_replay_cache_copies_drawn_members_once(folders, shards, tmp_path):
    cache = tmp_path / "cache"
    first = build(shards, replay_cache=str(cache))
    copies = [Path(path) for path in first.paths[41:]]
    assert len(copies) == 27 and all(path.parent == cache for path in copies)
    assert first.content_hash == build(folders).content_hash
    originals = build(folders).paths[41:]
    assert [path.read_bytes() for path in copies] == [Path(path).read_bytes() for path in originals]
    stamps = [path.stat().st_mtime_ns for path in copies]
    copies[3].write_bytes(b"damaged")
    again = build(shards, replay_cache=str(cache))
    changed = [path.stat().st_mtime_ns != stamp for path, stamp in zip(copies, stamps, strict=True)]
    assert list(again.paths) == list(first.paths) and changed == [row == 3 for row in range(27)]


FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("kind", FORMATS)
def test_member_names_of_every_tar_format(tmp_path, folders, kind):
    content = contents(folders[0])[0][1]
    long = "/".join(["folder" * 5] * 4) + "/" + "n" * 60 + ".jpg"
    names = ["./a b.jpg", "ü/ä.png", long, "/abs/x.JPG", "../up.webp"]
    write_tar(tmp_path / "x.tar", [(name, content) for name in names], format=kind)
    found = list_images(str(tmp_path / "x.tar"))
    expected = sorted(["a b.jpg", "ü/ä.png", long, "abs/x.JPG", "up.webp"])
    assert [path.split("x.tar/")[1] for path in found] == expected
    assert [read_bytes(path) for path in found] == [content] * 5
    for name in expected:
        assert len(list_images(str(tmp_path / "x.tar"), [os.path.splitext(name)[1]])) >= 1


def test_a_repeated_member_replaces_the_earlier_one(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.jpg", b"first"), ("b.jpg", b"other"), ("a.jpg", b"second")])
    assert [read_bytes(path) for path in list_images(str(tmp_path / "x.tar"))] == [b"second", b"other"]


def test_webdataset_classes_and_left_out_files(tmp_path, capsys):
    for shard in range(2):
        members = []
        for row in range(6):
            key = f"{shard}{row}"
            members += [(f"{key}.jpg", b"x"), (f"{key}.cls", str(row * 3).encode()), (f"{key}.json", b"{}")]
        members += [
            ("__MACOSX/._1.jpg", b"j"),
            ("__MACOSX/a.jpg", b"j"),
            ("more/@eaDir/b.jpg", b"j"),
            (".hidden.jpg", b"j"),
        ]
        write_tar(tmp_path / f"{shard}.tar", [*members, ("scan.tif", b"t"), ("raw", b"r")])
    for _ in range(2):  # made, and kept
        paths, labels, classes = labeled_folder(str(tmp_path / "{0,1}.tar"))
        assert classes == ["0", "3", "6", "9", "12", "15"] and labels == [0, 1, 2, 3, 4, 5] * 2 and len(paths) == 12
        (line,) = capsys.readouterr().err.splitlines()
        assert "12 images; left out: 16 other files (12 .json, 2 .tif, 2 without a suffix)" in line
        assert "2 x the folder @eaDir, 2 x the folder __MACOSX; add other suffixes of images to data.suffixes" in line
        messages._said.clear()
    assert len(list_images(str(tmp_path / "0.tar"), [".jpg", ".tif", ""])) == 8
    write_tar(tmp_path / "bad.tar", [("a.jpg", b"x"), ("a.cls", b"1"), ("b.jpg", b"x")])
    with pytest.raises(ValueError, match=r"bad.tar/b.jpg has no .cls file, but other images have one"):
        labeled_folder(str(tmp_path / "bad.tar"))
    write_tar(tmp_path / "flat.tar", [("a.jpg", b"x"), ("b.jpg", b"x")])
    with pytest.raises(ValueError, match=r"flat.tar' have no classes"):
        labeled_folder(str(tmp_path / "flat.tar"))


def test_the_index_is_cached_and_follows_the_shard(tmp_path, own_cache, monkeypatch):
    shard_file = write_tar(tmp_path / "x.tar", [(f"{row}.jpg", bytes([row + 1]) * 700) for row in range(4)])
    walked = []
    real = tar_index.walk
    monkeypatch.setattr("fastuft.data.sources.shards.walk", lambda *args: walked.append(1) or real(*args))
    assert len(list_images(str(shard_file))) == len(list_images(str(shard_file))) == 4 and len(walked) == 1
    write_tar(shard_file, [(f"{row}.jpg", bytes([row + 7]) * 700) for row in range(4)])
    os.utime(shard_file, ns=(0, 0))
    assert [read_bytes(path)[0] for path in list_images(str(shard_file))] == [7, 8, 9, 10] and len(walked) == 2
    (kept,) = own_cache.glob("*.npz")
    whole = kept.read_bytes()
    for damaged in (whole[:100], b"", bytes(len(whole)), whole[:-400] + bytes(400)):
        kept.write_bytes(damaged)
        walked.clear()
        assert len(list_images(str(shard_file))) == 4 and walked == [1]
    np.savez(kept, about=np.array([{"an": "object"}], object))  # pickled: never loaded
    assert len(list_images(str(shard_file))) == 4 and len(walked) == 2


def test_an_outdated_index_is_detected_on_reading(tmp_path, own_cache):
    """A shard that was rewritten with the same size and modification time."""
    shard_file = write_tar(tmp_path / "x.tar", [("a.jpg", b"1" * 700), ("b.jpg", b"2" * 100)])
    time_before, size = shard_file.stat().st_mtime_ns, shard_file.stat().st_size
    list_images(str(shard_file))
    write_tar(shard_file, [("b.jpg", b"1" * 100), ("a.jpg", b"2" * 700)])
    os.utime(shard_file, ns=(time_before, time_before))
    assert shard_file.stat().st_size == size
    for path in list_images(str(shard_file)):
        with pytest.raises(
            BadImageError,
            match=r"x.tar/[ab].jpg: cannot be read \(the shard x.tar has changed since the shard was indexed",
        ):
            read_bytes(path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b[:2100], r"is cut off within b.jpg: it ends at byte 2100 of 3\d+"),
        (lambda b: b[:1536], "ends at byte 1536 without the end-of-archive mark"),
        (lambda b: b[: len(b) // 512 * 512 - 10240 + 4000] if len(b) > 20000 else b[:3000], "is cut off within b.jpg"),
        (lambda b: b[:1536] + b"garbage" * 80 + b[2096:], "has no valid header at byte 1536"),
        (lambda b: b"\x1f\x8b" + b[2:], "is compressed"),
        (lambda b: b"", "ends at byte 0"),
    ],
)
def test_damaged_shards_are_named(tmp_path, damage, words):
    good = write_tar(tmp_path / "good.tar", [("a.jpg", b"1" * 700)])
    bad = write_tar(tmp_path / "bad.tar", [("a.jpg", b"1" * 700), ("b.jpg", b"2" * 1500)])
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(ValueError, match=rf"1 of 2 shards cannot be used: \S*/bad.tar {words}.*Copy them again"):
        list_images([str(tmp_path / "{good,bad}.tar")])
    assert len(list_images(str(good))) == 1


def test_missing_shards_are_all_named(shards):
    text = shards[0].replace("{00..02}", "{00..09}")
    with pytest.raises(ValueError, match=r"7 of 10 files cannot be used: \S*t-03.tar does not exist; .*; and 1 more"):
        list_images(text)
    with pytest.raises(ValueError, match="matches no file"):
        list_images(os.path.dirname(shards[0]) + "/no*.tar")
    with pytest.raises(ValueError, match=r"\{9\.\.3\}' is not a range"):
        list_images(shards[0].replace("{00..02}", "{9..3}"))


def test_shards_without_images_are_refused(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.txt", b"x")])
    with pytest.raises(ValueError, match=r"x.tar' has no images"):
        list_images(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("loader", LOADERS)
def test_each_member_of_a_shard_changed_during_a_run_is_a_bad_file(folders, tmp_path, loader):
    """The error names member and shard; if bad files are skipped, each member is counted and listed."""
    text = pack(folders[0], tmp_path, "t", 4)

    def stream(on_bad_file):
        return stream_of(Manifest.build(text), DataConfig(batch_size=8, loader=loader, on_bad_file=on_bad_file))

    first, second = stream("error"), stream("skip")
    with open(text.replace("{00..03}", "02"), "r+b") as file:
        file.truncate(3000)
    with pytest.raises(
        BadImageError, match=r"t-02.tar/class\d/\d+.\w+: cannot be read \(the shard t-02.tar has changed"
    ):
        list(first.epoch(0))
    assert len(list(second.epoch(0))) == second.steps_per_epoch
    assert second.bad_files and all("t-02.tar/" in bad.path and "has changed" in bad.reason for bad in second.bad_files)


@pytest.mark.slow
def test_a_million_members_load_in_seconds(tmp_path, own_cache):
    """Prints seconds and bytes per member of loading the cached indexes of 1,000 shards."""
    import tracemalloc

    names = [f"n{shard:08d}/n{shard:08d}_{row}.JPEG".encode() for shard in range(1000) for row in range(1000)]
    locations = []
    for shard in range(1000):
        shard_file = tmp_path / f"{shard:04d}.tar"
        shard_file.write_bytes(b"")
        os.truncate(shard_file, 1000 * 110_080 + 1024)
        index = tar_index.ShardIndex(
            np.arange(1000) * 110_080 + 512, np.full(1000, 109_000), tar_index.Texts.of(names[shard * 1000 :][:1000])
        )
        blob = tar_index_blob(shard_file)
        tar_index.keep_index(index, blob, (".jpg", ".jpeg", ".png", ".bmp", ".webp"), own_cache)
        locations.append(shard_file)
    del names
    tracemalloc.start()
    began = time.perf_counter()
    images = list_images(str(tmp_path / "*.tar"))
    seconds = time.perf_counter() - began
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{seconds:.1f} s with tracing, {held / 1e6:.0f} bytes per member held, {peak / 1e6:.0f} at most")
    assert len(images) == 1_000_000 and images[1001].endswith("1.tar/n00000001/n00000001_1.JPEG")
    assert seconds < 30 and held < 120e6 and peak < 300e6


def tar_index_blob(shard_file):
    from fastuft.data.sources.blobs import LocalBlob

    return LocalBlob.look(str(shard_file))
