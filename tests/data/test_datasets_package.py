"""Folders written by the ``datasets`` library itself: saved data sets and its cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastuft.data import labeled_folder, list_images, read_bytes

pytestmark = pytest.mark.peers
datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def loaded(folders, tmp_path_factory):
    """The target folder loaded by ``datasets``, and its cache folder."""
    cache = tmp_path_factory.mktemp("datasets-cache")
    loaded = datasets.load_dataset("imagefolder", data_dir=folders[0], split="train", cache_dir=str(cache))
    return loaded, cache


def test_a_saved_data_set_equals_the_folder(folders, loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    data_set = loaded[0]
    data_set.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    paths, labels, names = labeled_folder(str(tmp_path / "saved"))
    assert (labels, names) == (data_set["label"][:], data_set.features["label"].names)
    raw = data_set.cast_column("image", datasets.Image(decode=False))
    originals = [Path(row["image"]["path"]).read_bytes() for row in raw]
    assert [read_bytes(path) for path in paths] == originals and len(paths) == 41
    datasets.DatasetDict({"train": data_set, "test": data_set.select(range(5))}).save_to_disk(str(tmp_path / "both"))
    assert [len(list_images(str(tmp_path / "both" / part))) for part in ("train", "test")] == [41, 5]
    (tmp_path / "saved" / "data-00002-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3 numbered files"):
        list_images(str(tmp_path / "saved"))


def test_caches_with_bytes_are_read_and_caches_with_paths_refused(folders, loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    data_set, cache = loaded
    with pytest.raises(ValueError, match=r"has paths of images and no bytes; save the data set with save_to_disk"):
        list_images(str(cache))  # a data set of local files is kept as their paths
    (tmp_path / "hub").mkdir()
    data_set.save_to_disk(str(tmp_path / "saved"))
    datasets.load_from_disk(str(tmp_path / "saved")).to_parquet(str(tmp_path / "hub" / "train-00000-of-00001.parquet"))
    datasets.load_dataset(str(tmp_path / "hub"), split="train", cache_dir=str(tmp_path / "kept"))
    from_cache, from_parquet = (labeled_folder(str(tmp_path / name)) for name in ("kept", "hub"))
    assert [read_bytes(path) for path in from_cache[0]] == [read_bytes(path) for path in from_parquet[0]]
    assert from_cache[1:] == from_parquet[1:]
