"""Published layouts are read exactly, their sizes are checked, and no code in them runs."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastuft.reproduce.shards as shards_module
from fastuft.reproduce import DatasetMissing, Sizes, extract_tar_sample, prepare_dataset, write_tiny_datasets
from fastuft.reproduce.cifar import read_cifar_images, read_cifar_names, read_cifar_pickle
from fastuft.reproduce.datasets import LAYOUTS

SIZES = {"sizes": Sizes(200, None, 10)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    write_tiny_datasets(folder, num_train=200, num_glyphs=62)
    return folder


@pytest.mark.parametrize("name", ["caltech101", "pet", "cifar100", "food101"])
def test_each_layout_becomes_class_folders(root, tmp_path, name):
    prepared = prepare_dataset(name, root, tmp_path, caltech_per_class=20, **SIZES)
    train = sorted(Path(prepared.train).rglob("*.*"))
    test = sorted(Path(prepared.test).rglob("*.*"))
    assert len(train) == 200 and len(test) > 200
    assert {p.parent.name for p in train} == {p.parent.name for p in test}
    assert len({p.parent.name for p in train}) == 10
    assert not {p.resolve() for p in train} & {p.resolve() for p in test}
    with Image.open(train[0]) as image:
        assert image.size == (32, 32)
    assert prepare_dataset(name, root, tmp_path, caltech_per_class=20, **SIZES) == prepared


def test_cifar_pixels_and_labels_are_exact(root, tmp_path):
    prepared = prepare_dataset("cifar100", root, tmp_path, **SIZES)
    content = pickle.loads((root / "cifar-100-python" / "train").read_bytes())
    for index in (0, 7, 199):
        path = Path(prepared.train, f"digit_{content['fine_labels'][index]}", f"{index:05d}.png")
        expected = content["data"][index].reshape(3, 32, 32).transpose(1, 2, 0)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), expected)


def test_wrong_sizes_are_refused(root, tmp_path):
    words = r"200 training and 249 test images of 10 classes; expected 3680 training and 3669 test images of 37"
    with pytest.raises(ValueError, match=words):
        prepare_dataset("pet", root, tmp_path)
    for sizes in (Sizes(200, 250, 10), Sizes(201, None, 10), Sizes(200, None, 11)):
        with pytest.raises(ValueError, match="Download it again"):
            prepare_dataset("pet", root, tmp_path, sizes=sizes)
    prepared = prepare_dataset("pet", root, tmp_path, sizes=Sizes(200, 249, 10))
    assert len(list(Path(prepared.test).rglob("*.jpg"))) == 249


def test_sizes_equal_the_paper_and_the_published_test_sets():
    sizes = {name: (layout.sizes.train, layout.sizes.test, layout.sizes.classes) for name, layout in LAYOUTS.items()}
    assert sizes == {
        "caltech101": (3060, None, 102),
        "pet": (3680, 3669, 37),
        "cifar100": (50000, 10000, 100),
        "food101": (75750, 25250, 101),
    }
    assert {name: layout.metric for name, layout in LAYOUTS.items()} == {
        "caltech101": "mean_class",
        "pet": "mean_class",
        "cifar100": "top1",
        "food101": "top1",
    }


def test_leftovers_of_another_split_are_detected(root, tmp_path):
    stray = tmp_path / "pet" / "train" / "Digit_1" / "stray.jpg"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"of a layout that was broken off")
    with pytest.raises(ValueError, match="use another folder"):
        prepare_dataset("pet", root, tmp_path, **SIZES)


def test_a_missing_dataset_names_the_download_and_its_folder(tmp_path):
    with pytest.raises(DatasetMissing, match=r"food-101\.tar\.gz.*so that this path exists"):
        prepare_dataset("food101", tmp_path, tmp_path / "cache")


def test_unknown_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="choose one of caltech101, pet, cifar100, food101"):
        prepare_dataset("cars", tmp_path, tmp_path)


def test_a_missing_listed_file_is_named(root, tmp_path):
    lists = root / "food-101" / "meta" / "train.txt"
    original = lists.read_text()
    lists.write_text(original.replace(original.split()[0], "digit_0/999999", 1))
    try:
        with pytest.raises(DatasetMissing, match=r"999999\.jpg"):
            prepare_dataset("food101", root, tmp_path, **SIZES)
    finally:
        lists.write_text(original)


def test_cache_of_another_split_is_refused(root, tmp_path):
    prepare_dataset("caltech101", root, tmp_path, caltech_per_class=20, **SIZES)
    with pytest.raises(ValueError, match="use another folder"):
        prepare_dataset("caltech101", root, tmp_path, caltech_per_class=10, **SIZES)


def test_a_caltech_class_that_is_too_small_is_named(root, tmp_path):
    with pytest.raises(ValueError, match=r"class digit_\d has only \d+ images"):
        prepare_dataset("caltech101", root, tmp_path, caltech_per_class=200)


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"data": Bomb()}, protocol=2),
        pickle.dumps(np.zeros(3, dtype=object), protocol=2),
        pickle.dumps([1, 2], protocol=2),
        b"\x80\x02junk",
        b"\x80\x02t.",
        b"",
    ],
)
def test_hostile_or_broken_cifar_files_are_refused_and_run_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(ValueError, match="is not a CIFAR-100 file"):
        read_cifar_pickle(tmp_path / "train")
    assert not (tmp_path / "exploded").exists()


def test_python2_style_cifar_pickle_is_read(tmp_path):
    """Python 2 wrote byte strings where Python 3 writes text, for keys and raw array data."""
    data = bytes(range(256))
    raw = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04"
        b"K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02K\x80\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x01\x00\x00"
        + data
        + b"tbU\x0bfine_labelsq\x08"
        b"]q\x09(K\x01K\x02eu."
    )
    (tmp_path / "train").write_bytes(raw)
    content = read_cifar_pickle(tmp_path / "train")
    assert content["fine_labels"] == [1, 2]
    np.testing.assert_array_equal(content["data"], np.frombuffer(data, np.uint8).reshape(2, 128))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}, "no fine_labels from 0 to 9.*CIFAR-10 is another"),
        ({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 10]}, "no fine_labels from 0 to 9"),
        ({"data": np.zeros((2, 3000), np.uint8), "fine_labels": [0, 1]}, r"uint8 \(2, 3000\) as data"),
        ({"data": np.zeros((3, 3072), np.uint8), "fine_labels": [0, 1]}, "expected 2 rows of 3072 bytes"),
        ({"data": [[0] * 3072], "fine_labels": [0]}, "has list as data"),
    ],
)
def test_pickles_other_than_cifar100_are_refused(tmp_path, content, words):
    (tmp_path / "train").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=words):
        read_cifar_images(tmp_path / "train", 10)


def test_cifar_class_names_equal_cifar100(tmp_path):
    (tmp_path / "meta").write_bytes(pickle.dumps({"label_names": ["cat"]}, protocol=2))
    with pytest.raises(ValueError, match=r"no list of fine_label_names.*CIFAR-10 is another"):
        read_cifar_names(tmp_path / "meta")


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def test_a_tar_sample_is_fixed_by_its_seed_and_stays_in_its_folder(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(3):
        with tarfile.open(shards / f"n{shard}.tar", "w") as archive:
            for index in range(20):
                _add(archive, f"../../n{shard}_{index}.JPEG", f"{shard}-{index}".encode())
            _add(archive, "notes.txt", b"not an image")
    first = Path(extract_tar_sample(shards, tmp_path / "a", fraction=0.25, seed=3))
    again = Path(extract_tar_sample(shards, tmp_path / "b", fraction=0.25, seed=3))
    other = Path(extract_tar_sample(shards, tmp_path / "c", fraction=0.25, seed=4))

    def contents(folder: Path) -> set[bytes]:
        return {path.read_bytes() for path in folder.rglob("*.JPEG")}

    assert len(contents(first)) == 15
    assert contents(first) == contents(again) != contents(other)
    assert not list(tmp_path.glob("n*_*.JPEG"))


def _shards(folder: Path, *members: list[tuple[str, bytes]]) -> Path:
    folder.mkdir()
    for index, contents in enumerate(members):
        with tarfile.open(folder / f"n{index}.tar", "w") as archive:
            for name, content in contents:
                _add(archive, name, content)
    return folder


def test_classes_are_shard_names_or_cls_files(tmp_path):
    plain = _shards(tmp_path / "plain", [("a.jpg", b"1")], [("a.jpg", b"2"), ("b.png", b"3")])
    sample = Path(extract_tar_sample(plain, tmp_path / "a", fraction=1.0, seed=0))
    assert {(p.parent.name, p.read_bytes()) for p in sample.glob("*/*.*")} == {("n0", b"1"), ("n1", b"2"), ("n1", b"3")}
    webdataset = _shards(
        tmp_path / "web",
        [("x/1.cls", b"7"), ("x/1.jpg", b"1"), ("x/2.jpg", b"2"), ("x/2.cls", b"9\n")],
        [("x/1.jpg", b"3"), ("x/1.cls", b"9")],
    )
    sample = Path(extract_tar_sample(webdataset, tmp_path / "b", fraction=1.0, seed=0))
    assert {(p.parent.name, p.read_bytes()) for p in sample.glob("*/*.*")} == {("7", b"1"), ("9", b"2"), ("9", b"3")}


def test_images_with_similar_names_stay_distinct(tmp_path):
    """``a/b`` and ``a_b`` of one shard, and ``b_c`` of shard ``a`` beside ``c`` of shard ``a_b``."""
    shards = tmp_path / "shards"
    shards.mkdir()
    members = {
        "a": [("a/b.png", b"1"), ("a_b.png", b"2"), ("b_c.png", b"3"), ("twice.png", b"old"), ("twice.png", b"4")],
        "a_b": [("c.png", b"5")],
    }
    for shard, contents in members.items():
        with tarfile.open(shards / f"{shard}.tar", "w") as archive:
            for name, content in contents:
                _add(archive, name, content)
                _add(archive, name.replace(".png", ".cls"), b"7")
    sample = Path(extract_tar_sample(shards, tmp_path / "a", fraction=1.0, seed=0))
    assert sorted(path.read_bytes() for path in (sample / "7").iterdir()) == [b"1", b"2", b"3", b"4", b"5"]


def test_no_shard_or_member_name_escapes_the_sample(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    names = ["/etc/a.jpg", "../../b.jpg", "c" * 400 + ".jpg", "d\n\x1b.jpg", "..jpg", "sub/..\\e.jpg"]
    with tarfile.open(shards / "..tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for index, name in enumerate(names):
            _add(archive, name, bytes([index]))
    sample = Path(extract_tar_sample(shards, tmp_path / "a", fraction=1.0, seed=0))
    written = sorted(
        path.relative_to(sample) for path in sample.rglob("*") if path.suffix != ".json" and path.is_file()
    )
    assert len(written) == len(names) and all(len(path.parts) == 2 for path in written)
    assert {(sample / path).read_bytes() for path in written} == {bytes([index]) for index in range(len(names))}
    assert {path.name for path in tmp_path.iterdir()} == {"shards", "a"}


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([], r"has no \.tar shards"),
        ([[("a.txt", b"")]], "have no images; expected files ending in .jpg"),
        ([[("1.jpg", b""), ("2.jpg", b""), ("1.cls", b"3")]], r"2\.jpg has the class ''"),
        ([[("1.jpg", b""), ("1.cls", b"../up")]], r"1\.jpg has the class '\.\./up'"),
    ],
)
def test_shards_without_classes_or_images_are_refused(tmp_path, members, words):
    with pytest.raises(ValueError, match=words):
        extract_tar_sample(_shards(tmp_path / "shards", *members), tmp_path / "a", fraction=0.5, seed=0)


def test_damaged_shards_are_named(tmp_path):
    shards = _shards(tmp_path / "shards", [("a.jpg", b"1")])
    (shards / "n0.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(ValueError, match=r"n0\.tar is not a readable tar file"):
        extract_tar_sample(shards, tmp_path / "a", fraction=0.5, seed=0)


def test_a_stopped_sample_resumes_and_is_not_mixed_with_another(tmp_path, monkeypatch):
    shards = _shards(tmp_path / "shards", *[[(f"{i}.jpg", bytes([s, i])) for i in range(8)] for s in range(3)])
    read, taken = shards_module._content, []

    def stop_after_four(*args):
        if len(taken) == 4:
            raise KeyboardInterrupt
        taken.append(args)
        return read(*args)

    monkeypatch.setattr(shards_module, "_content", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        extract_tar_sample(shards, tmp_path / "a", fraction=0.5, seed=0)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has another sample"):
        extract_tar_sample(shards, tmp_path / "a", fraction=1.0, seed=0)
    folder = Path(extract_tar_sample(shards, tmp_path / "a", fraction=0.5, seed=0))
    assert len(list(folder.glob("*/*.jpg"))) == 12
    monkeypatch.setattr(shards_module, "_images", None)  # a finished sample is not drawn again
    assert extract_tar_sample(shards, folder, fraction=0.5, seed=0) == str(folder)


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a/b", "..", "a\0b"])
def test_cifar_names_that_escape_the_folder_are_refused(root, tmp_path, name):
    shutil.copytree(root / "cifar-100-python", tmp_path / "in" / "cifar-100-python")
    names = [f"digit_{label}" for label in range(9)] + [name]
    (tmp_path / "in" / "cifar-100-python" / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))
    with pytest.raises(ValueError, match="is not a plain name"):
        prepare_dataset("cifar100", tmp_path / "in", tmp_path / "cache", **SIZES)
    assert not list(tmp_path.rglob("*.png"))


def test_repeated_cifar_names_are_refused(tmp_path):
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": ["cat", "cat"]}, protocol=2))
    with pytest.raises(ValueError, match="names a class twice"):
        read_cifar_names(tmp_path / "meta")


@pytest.mark.parametrize(
    ("dataset", "file", "line", "words"),
    [
        ("pet", "annotations/trainval.txt", "../../outside_1 1 1 1", "is not a plain name"),
        ("pet", "annotations/test.txt", "/outside_1 1 1 1", "is not a plain name"),
        ("food101", "meta/train.txt", "../1", "is not a plain name"),
        ("food101", "meta/train.txt", "digit_0/../../1", "is not a plain name"),
        ("food101", "meta/test.txt", "digit_0", "is not a plain name|does not exist"),
        ("pet", "annotations/trainval.txt", None, "lists .* twice"),
    ],
)
def test_listed_names_that_escape_or_repeat_are_refused(root, tmp_path, dataset, file, line, words):
    folder = LAYOUTS[dataset].folder
    shutil.copytree(root / folder, tmp_path / "in" / folder)
    listed = tmp_path / "in" / folder / file
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join([lines[1] if line is None else line, *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=words):
        prepare_dataset(dataset, tmp_path / "in", tmp_path / "cache", **SIZES)
    assert not (tmp_path / "cache").exists()
