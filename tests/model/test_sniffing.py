"""File detection: a file that is not a checkpoint is refused with its kind and a remedy, and runs no code."""

from __future__ import annotations

import argparse
import bz2
import collections
import datetime
import gzip
import io
import json
import lzma
import os
import pathlib
import pickle
import struct
import tarfile
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from fastuft.model import build_backbone, load_init
from fastuft.model.checkpoint.reading import read_checkpoint


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def torch_bytes(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def numpy_bytes(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x.pth"))
    return buffer.getvalue()


def zip_bytes(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def huge_array() -> bytes:
    """A NumPy member of 8 bytes whose header declares a terabyte."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117) + b"\n"
    return zip_bytes(**{"w.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 8})


def bad_crc() -> bytes:
    content = bytearray(numpy_bytes(w=np.arange(1000, dtype=np.float32)))
    content[600] ^= 0xFF
    return bytes(content)


def bomb() -> bytes:
    """100 MB that deflate to a few hundred bytes per MB, declared as 8 GB."""
    content = bytearray(zip_bytes(**{"w.npy": b"\x93NUMPY\x01\x00" + bytes(3_000_000)}))
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 4_000_000_000)
    return bytes(content)


TORCH = torch_bytes({"weight": torch.ones(1000)})
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 97781949\n"

FILES = {
    "lfs": (LFS, "a Git LFS pointer.*git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", r"a web page \(HTML\).*download the file itself"),
    "gzip": (gzip.compress(TORCH), r"compressed with gzip; unpack it first \(gunzip x\)"),
    "bzip2": (bz2.compress(TORCH), "compressed with bzip2"),
    "xz": (lzma.compress(TORCH), "compressed with xz"),
    "tar": (tar_bytes(), "a tar archive; unpack it"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b.safetensors"}}', "the index of a checkpoint in several files"),
    "json": (b'{"error": "not found", "status": 404}', "JSON text"),
    "text": (b"Access denied, please log in first.", "text, which has no weights"),
    "zeros": (bytes(5000), "filled with zeros, as after an interrupted download"),
    "empty": (b"", "empty; copy or download it again"),
    "short": (b"short", "only 5 bytes long"),
    "noise": (bytes(range(128, 256)) * 4, "of an unknown format"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(100), "an image"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(100), "one NumPy array without names"),
    "pickle": (pickle.dumps({"state_dict": Bomb()}), "a pickle, which is not read because it could run code"),
    "cut torch": (TORCH[: len(TORCH) // 2], "a truncated or damaged archive"),
    "cut safetensors": (save({"w": torch.ones(99)})[:60], "a truncated safetensors file"),
    "other zip": (zip_bytes(readme=b"hello"), "a ZIP archive without a checkpoint's members"),
    "torchscript": (zip_bytes(**{"m/data.pkl": b"", "m/constants.pkl": b""}), "a TorchScript program"),
    "object npz": (
        numpy_bytes(w=np.array([Bomb()], dtype=object)),
        r"without arrays of numbers; it has w \(object\)",
    ),
    "text npz": (numpy_bytes(w=np.array(["cat"])), r"without arrays of numbers; it has w \(<U3\)"),
    "struct npz": (numpy_bytes(w=np.zeros(2, [("a", "f4")])), "without arrays of numbers"),
    "bad crc npz": (bad_crc(), "a damaged NumPy archive.*CRC"),
    "huge npz": (huge_array(), r"declares shape \(1000000, 1000000\)"),
    "bomb npz": (bomb(), "it would unpack to 4 GiB"),
    "no tensors": (torch_bytes({"epoch": 3}), "has no tensors"),
    "safetensors of junk": ((100).to_bytes(8, "little") + b"{" + b"x" * 200, "a damaged safetensors file"),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_error_says_what_a_file_is_instead_of_a_checkpoint(tmp_path, monkeypatch, kind):
    content, message = FILES[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_checkpoint(tmp_path / "x")
    assert "weights_only" not in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "exploded").exists()


def test_code_in_a_torch_archive_is_named_and_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=r"Python objects beside its tensors \(posix\.system\)\. Nothing in a checkpoint"
    ):
        read_checkpoint(tmp_path / "x.pth")
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_torch_archive_is_reported(tmp_path):
    content = bytearray(torch_bytes({"weight": torch.arange(1000.0)}))
    content[content.index(b"ctorch._utils")] = 0xFF  # an opcode that pickle does not have
    (tmp_path / "x").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="is a damaged torch archive"):
        read_checkpoint(tmp_path / "x")


@pytest.mark.parametrize("part", ["weight", "structure"])
def test_a_flipped_byte_in_a_torch_archive_is_detected(tmp_path, part):
    content = bytearray(torch_bytes({"weight": torch.arange(1000.0)}))
    marks = {"weight": torch.arange(500.0, 510.0).numpy().tobytes(), "structure": b"weight"}
    content[content.index(marks[part])] ^= 1
    (tmp_path / "x").write_bytes(bytes(content))
    with pytest.raises(
        ValueError, match=r"is a damaged torch archive \(Bad CRC-32 for file .*; copy or download it again"
    ):
        read_checkpoint(tmp_path / "x")


def test_a_torch_archive_without_checksums_loads(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        (tmp_path / "x").write_bytes(torch_bytes({"weight": torch.arange(10.0)}))
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "x").tensors["weight"].tolist() == list(range(10))


def test_missing_files_and_folders_without_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        read_checkpoint(tmp_path / "x")
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="is a folder without checkpoints"):
        load_init(build_backbone("resnet_tiny", "small"), tmp_path / "run")


def test_harmless_objects_beside_the_tensors_are_ignored(tmp_path):
    content = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.PosixPath("/data")),
        "more": types.SimpleNamespace(a=1),
        "best": np.float64(0.5),
        "history": np.arange(3),
        "names": np.array(["a"], dtype=object),
        "when": datetime.datetime(2024, 1, 1),
        "path": pathlib.PurePosixPath("x"),
        "seen": collections.deque([1, 2]),
        "by_class": collections.defaultdict(list, {"cat": 1}),
        "inner": collections.defaultdict(dict, {"model": {"weight": torch.ones(3)}}),
        "shape": slice(1, 2),
    }
    torch.save(content, tmp_path / "x.pth")
    assert list(read_checkpoint(tmp_path / "x.pth").tensors) == ["inner.model.weight"]


def test_legacy_torch_archives_load(tmp_path):
    torch.save(
        {"args": argparse.Namespace(a=1), "w": torch.ones(3)}, tmp_path / "x", _use_new_zipfile_serialization=False
    )
    assert list(read_checkpoint(tmp_path / "x").tensors) == ["w"]


def test_numpy_archives_load_and_their_strings_are_ignored(tmp_path):
    arrays = {"big": np.arange(3, dtype=">f4"), "columns": np.asfortranarray(np.eye(3)[:2]), "classes": np.array(["a"])}
    np.savez_compressed(tmp_path / "x.npz", one=np.float32(2), wide=np.ones(2, np.longdouble), **arrays)
    tensors = read_checkpoint(tmp_path / "x.npz").tensors
    assert sorted(tensors) == ["big", "columns", "one", "wide"]
    assert tensors["big"].tolist() == [0, 1, 2] and tensors["one"].shape == ()
    assert torch.equal(tensors["columns"], torch.eye(3, dtype=torch.float64)[:2])


@pytest.mark.parametrize(
    "said",
    ["not json", "[]", '{"arch": 5}', '{"arch": "resnet_tiny", "stem": "odd"}', '{"traits": [1]}', "[" * 100_000],
)
def test_malformed_safetensors_metadata_is_refused_by_name(tmp_path, said):
    save_file(build_backbone("resnet_tiny", "small").state_dict(), tmp_path / "x", metadata={"fastuft": said})
    with pytest.raises(ValueError, match="has a damaged description of its network"):
        load_init(build_backbone("resnet_tiny", "small"), tmp_path / "x")


def test_dicts_that_contain_themselves_are_refused(tmp_path):
    loop = {"w": torch.ones(1)}
    loop["self"] = loop
    torch.save(loop, tmp_path / "x")
    with pytest.raises(ValueError, match="nests dicts more than 16 deep"):
        read_checkpoint(tmp_path / "x")


def test_a_name_with_thousands_of_parts_is_fast_and_abbreviated(tmp_path):
    names = {"." * 20_000: torch.ones(1), "a\x1b[31m\n." * 5_000 + "conv1.weight": torch.ones(3)}
    torch.save({**build_backbone("resnet_tiny", "small").state_dict(), **names}, tmp_path / "x")
    began = time.perf_counter()
    report = load_init(build_backbone("resnet_tiny", "small"), tmp_path / "x")
    assert time.perf_counter() - began < 5
    assert len(report.ignored) == 2 and all(len(name) < 120 and name.isprintable() for name in report.ignored)


FAULTS = {
    "nan": (lambda w: w.fill_(float("nan")), r"conv1\.weight has NaN or infinity"),
    "infinite": (lambda w: w.fill_(float("inf")), "has NaN or infinity"),
    "integers": (lambda w: w.to(torch.int8), "is int8, quantized or integer"),
    "quantized": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "is qint8, quantized"),
    "meta": (lambda w: w.to("meta"), "has no data"),
    "sparse": (lambda w: w.to_sparse(), "is stored as sparse_coo; save it dense"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unusable_weights_are_refused_by_name(tmp_path, fault):
    damage, message = FAULTS[fault]
    state = build_backbone("resnet_tiny", "small").state_dict()
    state["conv1.weight"] = damage(state["conv1.weight"])
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    backbone = build_backbone("resnet_tiny", "small")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_init(backbone, tmp_path / "x.pth")
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_faults_in_unused_tensors_are_ignored(tmp_path):
    state = {**build_backbone("resnet_tiny", "small").state_dict(), "queue": torch.full((3,), float("nan"))}
    torch.save(state, tmp_path / "x.pth")
    assert load_init(build_backbone("resnet_tiny", "small"), tmp_path / "x.pth").ignored == ("queue",)


@pytest.mark.parametrize("config", ["", "[]", '{"model_type": "resnet"}'])
def test_a_transformers_folder_without_weights_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_checkpoint(tmp_path)


def test_sharded_weights_load_from_the_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="does not name shards beside it"):
        read_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}))
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"lacks b\.safetensors; download all 2 files"):
        read_checkpoint(tmp_path)
    save_file({"v": torch.ones(3)}, tmp_path / "b.safetensors")
    assert sorted(read_checkpoint(tmp_path).tensors) == ["v", "w"]


def test_sharded_torch_archives_load(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    shards = {"w": "pytorch_model-00001-of-00002.bin", "v": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    for name, file in shards.items():
        torch.save({name: torch.ones(2)}, tmp_path / file)
    assert sorted(read_checkpoint(tmp_path).tensors) == ["v", "w"]
    (tmp_path / shards["v"]).unlink()
    with pytest.raises(ValueError, match=r"lacks pytorch_model-00002-of-00002\.bin"):
        read_checkpoint(tmp_path)
