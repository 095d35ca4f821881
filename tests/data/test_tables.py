"""Parquet files with image bytes: rows in order, pixels equal to the folder's, row groups read once."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from stream_cases import LOADERS, plain, stream_of

from fastuft.config import DataConfig
from fastuft.data import BadImageError, EvalStream, Manifest, labeled_folder, list_images, read_bytes
from fastuft.data.sources import tables

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(out: Path, paths, labels, names, *, group=7, noted=True):
    """A file as ``datasets`` writes it: a struct of bytes and path, a class label, and their description in the metadata."""
    images = [{"bytes": Path(path).read_bytes(), "path": Path(path).name} for path in paths]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "label": pa.array(labels, pa.int64())})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    if noted:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    out.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, out, row_group_size=group)


@pytest.fixture(scope="module")
def data_set(folders, tmp_path_factory):
    """The target folder in two files, as in a clone of a data set."""
    out = tmp_path_factory.mktemp("cloned")
    paths, labels, names = labeled_folder(folders[0])
    for number, rows in enumerate((slice(0, 20), slice(20, None))):
        write(out / "data" / f"train-{number:05d}-of-00002.parquet", paths[rows], labels[rows], names)
    (out / "README.md").touch()
    return out


def test_rows_equal_the_images_of_the_folder(folders, data_set, tmp_path):
    expected, labels, names = labeled_folder(folders[0])
    for text in (
        data_set,
        data_set / "data" / "train-*.parquet",
        data_set / "data" / "train-{00000,00001}-of-00002.parquet",
    ):
        ours, our_labels, our_names = labeled_folder(str(text))
        assert [read_bytes(path) for path in ours] == [Path(path).read_bytes() for path in expected]
        assert (our_labels, our_names) == (labels, names)
    assert ours[21] == str(data_set / "data" / "train-00001-of-00002.parquet" / "1")
    (tmp_path / "link").symlink_to(data_set)
    first, second = Manifest.build(str(data_set)), Manifest.build(str(tmp_path / "link"))
    assert first.content_hash == second.content_hash and len(first) == 41


@pytest.mark.parametrize("loader", LOADERS)
def test_pixels_equal_the_folder_for_any_ranks(folders, data_set, loader):
    def batches(target, rank=0, world_size=1):
        data = DataConfig(batch_size=8, loader=loader, threads=1)
        return list(stream_of(Manifest.build(target), data, seed=3, rank=rank, world_size=world_size).epoch(1))

    listed = data_set / "order.txt"
    listed.write_text("\n".join(labeled_folder(folders[0])[0]))
    whole, ranks = batches(str(listed)), [batches(str(data_set / "data"), rank, 2) for rank in range(2)]
    listed.unlink()
    for step, batch in enumerate(whole):
        for name in ("query", "key", "index"):
            assert torch.equal(torch.cat([getattr(rank[step], name) for rank in ranks]), getattr(batch, name))


def test_a_row_group_is_read_once_for_its_images_in_order(data_set, monkeypatch):
    read = []
    real = tables._Table.column_of
    monkeypatch.setattr(tables._Table, "column_of", lambda *args: read.append(args[1:]) or real(*args))
    stream = EvalStream(list_images(str(data_set)), loading=plain("torch"), size=32)
    assert sum(len(views) for views, _ in stream) == 41
    assert sorted(read) == sorted([(group, "image.bytes") for group in (0, 1, 2)] * 2)
    monkeypatch.setattr(tables, "_HELD", 1)
    paths = list_images(str(data_set))
    for row in (0, 8, 1):  # no room: the first group is read again
        read_bytes(paths[row])
    assert len(read) == 6 + 3


def test_several_threads_read_a_group_once(data_set, monkeypatch):
    read, paths = [], list_images(str(data_set))
    real = tables._Table.column_of
    monkeypatch.setattr(tables._Table, "column_of", lambda *args: read.append(1) or real(*args))
    threads = [threading.Thread(target=read_bytes, args=(path,)) for path in paths[:7]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [1]


def test_damaged_tables_are_named(folders, data_set, tmp_path):
    paths, labels, names = labeled_folder(folders[0])
    out = tmp_path / "x.parquet"
    write(out, paths[:9], labels[:9], names, noted=False)
    assert len(list_images(str(out))) == 9
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"1 of 1 parquet files cannot be used: \S*x.parquet is not a whole parquet file"
    ):
        list_images(str(out))
    out.write_bytes(whole)
    found = list_images(str(out))
    out.write_bytes(bytes(3000) + whole[3000:])
    with pytest.raises(
        BadImageError, match=r"x.parquet/0: cannot be read \(the file x.parquet has (changed|a damaged row)"
    ):
        read_bytes(found[0])
    parquet.write_table(pa.table({"a": pa.array([b"x"]), "b": pa.array([b"y"])}), out)
    with pytest.raises(ValueError, match=r"needs one column of image bytes and has 2 \(a, b\)"):
        list_images(str(out))
    parquet.write_table(pa.table({"image": pa.array([b"x", None], pa.binary())}), out)
    found = list_images(str(out))
    assert read_bytes(found[0]) == b"x"
    with pytest.raises(BadImageError, match=r"x.parquet/1: is empty"):
        read_bytes(found[1])
