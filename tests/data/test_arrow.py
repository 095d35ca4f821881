"""Arrow files of ``save_to_disk``: rows are found in order without reading images, and pixels equal the folder's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from object_server import ObjectServer
from stream_cases import LOADERS, assert_ranks_make_the_batches, stream_of

from fastuft import messages
from fastuft.config import DataConfig
from fastuft.data import BadImageError, Manifest, labeled_folder, list_images, read_bytes, verify_files
from fastuft.data.sources import remote

pa = pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setattr(messages, "_said", set())


def table_of(contents, labels, names, *, large=False):
    """Columns as in ``datasets``: structs of bytes and path, class labels, and their description in the metadata."""
    kind = pa.large_binary() if large else pa.binary()
    rows = [
        None if content is None else {"bytes": content, "path": f"{row}.jpg"} for row, content in enumerate(contents)
    ]
    about = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    columns = {
        "note": pa.array([f"a text of row {row}" for row in range(len(rows))]),
        "image": pa.array(rows, pa.struct([("bytes", kind), ("path", pa.string())])),
        "label": pa.array(labels, pa.int64()),
    }
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": about}})})


def write(out: Path, table, *, batch=7, writer=pa.ipc.new_stream, compression=None):
    out.parent.mkdir(parents=True, exist_ok=True)
    with writer(str(out), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as file:
        file.write_table(table, max_chunksize=batch)
    return out


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    """The target folder as written by ``save_to_disk``, in three files."""
    out = tmp_path_factory.mktemp("saved") / "photos"
    paths, labels, names = labeled_folder(folders[0])
    for number, rows in enumerate((slice(0, 20), slice(20, 38), slice(38, None))):
        contents = [Path(path).read_bytes() for path in paths[rows]]
        write(out / f"data-{number:05d}-of-00003.arrow", table_of(contents, labels[rows], names))
    (out / "dataset_info.json").write_text("{}")
    (out / "state.json").write_text("{}")
    return out


def test_rows_equal_the_images_and_classes_of_the_folder(folders, saved, tmp_path):
    expected, labels, names = labeled_folder(folders[0])
    for text in (saved, f"{saved}/*.arrow", f"file://{saved}/data-{{00000..00002}}-of-00003.arrow"):
        ours, our_labels, our_names = labeled_folder(str(text))
        assert [read_bytes(path) for path in ours] == [Path(path).read_bytes() for path in expected]
        assert (our_labels, our_names) == (labels, names)
    assert ours[21] == str(saved / "data-00001-of-00003.arrow" / "1")
    assert verify_files(ours, decode=True) == []
    (tmp_path / "link").symlink_to(saved)
    first, second = Manifest.build(str(saved)), Manifest.build(str(tmp_path / "link"))
    assert first.content_hash == second.content_hash and len(first) == 41


@pytest.mark.parametrize("loader", LOADERS)
def test_pixels_equal_the_folder_for_any_ranks_and_restarts(folders, saved, tmp_path, loader):
    def batches(target, rank=0, world_size=1, start=0):
        data = DataConfig(batch_size=16, loader=loader, threads=1)
        stream = stream_of(Manifest.build(target), data, seed=3, rank=rank, world_size=world_size)
        return list(stream.epoch(1, start))

    listed = tmp_path / "order.txt"
    listed.write_text("\n".join(labeled_folder(folders[0])[0]))
    whole = batches(str(listed))
    for world_size in (1, 2, 4):
        assert_ranks_make_the_batches(whole, [batches(str(saved), rank, world_size) for rank in range(world_size)])
    assert torch.equal(batches(str(saved), start=1)[0].query, whole[1].query)


def test_finding_the_rows_reads_no_image(saved, monkeypatch):
    """Only headers, offsets and labels are read: for images of 60 kB, a fiftieth of the file; then the index is cached."""
    out = write(saved.parent / "large.arrow", table_of([b"x" * 60_000] * 200, [0] * 200, ["a"]), batch=50)
    read = []
    real = os.pread
    monkeypatch.setattr("os.pread", lambda file, length, offset: read.append(length) or real(file, length, offset))
    assert len(list_images(str(out))) == 200 and sum(read) < out.stat().st_size / 50
    read.clear()
    assert len(list_images(str(out))) == 200 and not read


@pytest.mark.parametrize("writer", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("large", [False, True])
def test_every_kind_of_file_and_column_is_read(tmp_path, writer, large):
    contents = [b"first", None, b"third" * 1000, b""]
    out = write(
        tmp_path / "x.arrow", table_of(contents, [1, 0, 1, 0], ["cat", "dog"], large=large), batch=3, writer=writer
    )
    found, labels, names = labeled_folder(str(out))
    assert [read_bytes(found[row]) for row in (0, 2)] == [contents[0], contents[2]]
    assert ([names[label] for label in labels]) == ["dog", "cat", "dog", "cat"]
    for row in (1, 3):
        with pytest.raises(BadImageError, match=rf"x.arrow/{row}: is empty"):
            read_bytes(found[row])
    assert Manifest.build(str(out)).content_hash  # sizes are the images'
    plain = pa.table({"photo": pa.array(contents, pa.large_binary() if large else pa.binary()), "kind": ["a"] * 4})
    found = list_images(str(write(tmp_path / "y.arrow", plain, writer=writer)))
    assert read_bytes(found[2]) == contents[2]
    with pytest.raises(ValueError, match=r"y.arrow' have no classes"):
        labeled_folder(str(tmp_path / "y.arrow"))


def test_the_class_column_may_have_another_name(tmp_path):
    about = {"img": {"_type": "Image"}, "breed": {"names": ["pug", "hound"], "_type": "ClassLabel"}}
    table = pa.table({"img": pa.array([b"1", b"2"]), "breed": pa.array([1, 0])})
    noted = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": about}})})
    assert labeled_folder(str(write(tmp_path / "x.arrow", noted)))[1:] == ([0, 1], ["hound", "pug"])


def test_rows_are_read_over_a_network(folders, saved, monkeypatch):
    with ObjectServer().serving() as server:
        server.put_folder(saved, "bucket/photos")
        for name, value in {"ENDPOINT": server.url, "ACCESS_KEY_ID": "an-id", "SECRET_ACCESS_KEY": "a-secret"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        remote._bucket.cache_clear()
        for text in ("s3://bucket/photos/", f"{server.url}/bucket/photos/data-{{00000..00002}}-of-00003.arrow"):
            paths, *labels = labeled_folder(text)
            assert [read_bytes(path) for path in paths] == [Path(p).read_bytes() for p in labeled_folder(folders[0])[0]]
            assert tuple(labels) == labeled_folder(folders[0])[1:]
            assert Manifest.build(text).content_hash == Manifest.build(str(saved)).content_hash
        del server.objects["/bucket/photos/data-00001-of-00003.arrow"]
        with pytest.raises(
            ValueError, match=r"'s3://bucket/photos/' lacks 1 of 3 numbered files, the first of them data-00001"
        ):
            list_images("s3://bucket/photos/")
        remote._bucket.cache_clear()


def test_missing_files_of_a_set_are_named(saved, tmp_path, capsys):
    for path in saved.iterdir():
        os.link(path, tmp_path / path.name)
    (tmp_path / "data-00001-of-00003.arrow").unlink()
    os.link(saved / "data-00000-of-00003.arrow", tmp_path / "cache-0123456789abcdef.arrow")
    with pytest.raises(
        ValueError, match=r"lacks 1 of 3 numbered files, the first of them data-00001-of-00003.arrow; copy"
    ):
        list_images(str(tmp_path))
    assert len(list_images(f"{tmp_path}/data-*.arrow")) == 41 - 18
    assert "1 files cache-*.arrow, intermediate results of datasets, are left out" in capsys.readouterr().err


def damaged_offsets(content: bytes) -> bytes:
    at = content.index((0).to_bytes(4, "little") + (900).to_bytes(4, "little"))
    return content[: at + 4] + (2**31 - 1).to_bytes(4, "little") + content[at + 8 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b[:-8], r"ends at byte \d+ without the end mark, so rows may be missing"),
        (lambda b: b[: len(b) // 2], r"is cut off within a record batch: it ends at byte \d+ of \d+"),
        (lambda b: b[:100], r"is cut off within a header: it ends at byte 100 of \d+"),
        (lambda b: b"", "ends at byte 0 without the end mark"),
        (lambda b: b"not arrow" * 40, "has no Arrow message at byte 0"),
        (lambda b: b[:8] + bytes(200) + b[208:], "is not a whole Arrow file|needs one column"),
        (damaged_offsets, "has a damaged column of images"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, words):
    table = table_of([b"1" * 900, b"2" * 900], [0, 1], ["a", "b"])
    good, bad = write(tmp_path / "good.arrow", table), write(tmp_path / "bad.arrow", table)
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(ValueError, match=rf"1 of 2 shards cannot be used: \S*/bad.arrow ({words}).*Copy them again"):
        list_images([f"{tmp_path}/{{good,bad}}.arrow"])
    assert len(list_images(str(good))) == 2


def test_any_flipped_byte_of_a_header_is_refused_or_harmless(tmp_path):
    """Any header gives rows or one message; nothing else is raised, and nothing is read past the end."""
    content = write(tmp_path / "x.arrow", table_of([b"1" * 900, b"2" * 900], [0, 1], ["a", "b"])).read_bytes()
    out = tmp_path / "flipped.arrow"
    outcomes = set()
    for at in range(0, len(content) - 1900, 3):
        out.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            outcomes.add(len(list_images(str(out))))
        except ValueError as error:
            outcomes.add("refused")
            assert "flipped.arrow" in str(error)
    assert {2, "refused"} <= outcomes


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_batches_are_refused(tmp_path, compression):
    out = write(tmp_path / "x.arrow", table_of([b"1" * 900] * 9, [0] * 9, ["a"]), compression=compression)
    with pytest.raises(ValueError, match=r"x.arrow is compressed, so its images cannot be read individually"):
        list_images(str(out))


def test_paths_without_bytes_are_refused(tmp_path):
    table = pa.table(
        {
            "image": pa.array(
                [{"bytes": None, "path": "/photos/1.jpg"}] * 3,
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            )
        }
    )
    with pytest.raises(
        ValueError, match=r"x.arrow has paths of images and no bytes; save the data set with save_to_disk"
    ):
        list_images(str(write(tmp_path / "x.arrow", table)))
    table = pa.table({"a": pa.array([b"x"]), "b": pa.array([b"y"])})
    with pytest.raises(ValueError, match=r"needs one column of image bytes and has 2 \(a, b\)"):
        list_images(str(write(tmp_path / "y.arrow", table)))


def test_a_changed_file_is_detected(tmp_path):
    out = write(tmp_path / "x.arrow", table_of([b"1" * 900], [0], ["a"]))
    (path,) = list_images(str(out))
    write(out, table_of([b"2" * 900], [0], ["a"]))
    os.utime(out, ns=(1, 1))
    with pytest.raises(BadImageError, match=r"x.arrow/0: cannot be read \(the shard x.arrow has changed"):
        read_bytes(path)
    assert read_bytes(list_images(str(out))[0]) == b"2" * 900


def test_missing_pyarrow_is_named(saved, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"data-0000\d-of-00003.arrow needs pyarrow; pip install 'fastuft\[parquet\]'"):
        list_images(str(saved))
