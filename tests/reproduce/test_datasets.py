"""The published layouts are read exactly, their sizes checked, and nothing in them is executed."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastuft.reproduce import DatasetMissing, extract_tar_sample, prepare_dataset, write_tiny_datasets
from fastuft.reproduce.datasets import read_cifar_pickle

SIZES = {"train_size": 200, "num_classes": 10}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("published")
    write_tiny_datasets(place, num_train=200, num_glyphs=62)
    return place


@pytest.mark.parametrize("name", ["caltech101", "pet", "cifar100", "food101"])
def test_each_layout_becomes_class_folders(root, tmp_path, name):
    prepared = prepare_dataset(name, root, tmp_path, caltech_per_class=20, **SIZES)
    train = sorted(Path(prepared.train).rglob("*.*"))
    test = sorted(Path(prepared.test).rglob("*.*"))
    assert len(train) == prepared.train_size == 200
    assert len(test) == prepared.test_size > 200
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
    with pytest.raises(ValueError, match=r"200 training images of 10 classes; expected are 3680 of 37"):
        prepare_dataset("pet", root, tmp_path)


def test_missing_dataset_says_what_to_download_and_where_it_goes(tmp_path):
    with pytest.raises(DatasetMissing, match=r"food-101\.tar\.gz.*so that this path exists"):
        prepare_dataset("food101", tmp_path, tmp_path / "cache")


def test_unknown_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="choose one of caltech101, pet, cifar100, food101"):
        prepare_dataset("cars", tmp_path, tmp_path)


def test_listed_file_that_is_missing_is_named(root, tmp_path):
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


def test_caltech_class_that_is_too_small_is_named(root, tmp_path):
    with pytest.raises(ValueError, match=r"class digit_\d has \d+ images"):
        prepare_dataset("caltech101", root, tmp_path, caltech_per_class=200)


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"data": Bomb()}, protocol=2),
        pickle.dumps(np.zeros(3, dtype=object), protocol=2),
        b"\x80\x02junk",
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
    """Python 2 wrote byte strings where Python 3 writes text: keys and raw array data are such strings."""
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


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def test_tar_sample_is_fixed_by_the_seed_and_stays_inside_its_folder(tmp_path):
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


def test_tar_sample_without_shards_is_refused(tmp_path):
    with pytest.raises(DatasetMissing, match=r"holds no \.tar shards"):
        extract_tar_sample(tmp_path, tmp_path / "a", fraction=0.1, seed=0)
