"""Embeddings: correct features, parts that survive a stop, both file formats, and search."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastuft.cli import main
from fastuft.config import EmbedConfig
from fastuft.jobs import Embeddings, embed_images, embedding, read_embeddings, write_embeddings
from fastuft.model import build_backbone, export_backbone, load_backbone


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for index in range(10):
        coarse = np.random.default_rng(index).integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp("checkpoint") / "start.safetensors"
    torch.manual_seed(0)
    export_backbone(build_backbone("resnet_tiny", "small"), file)
    return file


@pytest.fixture
def config(photos, checkpoint, tmp_path):
    return EmbedConfig(
        [str(photos)], str(checkpoint), str(tmp_path / "out.npz"), part_size=4, batch_size=3, loader="torch"
    )


def test_features_use_the_networks_own_preprocessing(config, photos, checkpoint):
    found = embed_images(config)
    backbone = load_backbone(checkpoint)
    assert found.features.shape == (10, backbone.num_features) and found.features.dtype == np.float32
    assert [os.path.basename(path) for path in found.paths] == [f"{index}.png" for index in range(10)]
    side = round(32 * 256 / 224)
    image = Image.open(photos / "3.png").resize((round(side * 48 / 40), side), Image.Resampling.BILINEAR)
    left, top = (image.width - 32) // 2, (image.height - 32) // 2
    pixels = torch.from_numpy(np.asarray(image.crop((left, top, left + 32, top + 32)), np.float32) / 255)
    mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
    with torch.inference_mode():
        expected = backbone(((pixels - mean) / std).permute(2, 0, 1)[None])[0]
    assert torch.cosine_similarity(torch.from_numpy(found.features[3]), expected, dim=0) > 0.999


def test_a_stopped_embedding_resumes_after_its_last_whole_part(config, monkeypatch):
    whole = embed_images(config, keep=False).features
    extract, calls = embedding.extract_features, []

    def stop_at_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return extract(*args, **kwargs)

    monkeypatch.setattr(embedding, "extract_features", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        embed_images(config)
    parts = sorted(path.name for path in (os.scandir(f"{config.out}.parts")))
    assert parts == ["000000.npy", "000001.npy", "key.txt"] and not os.path.exists(config.out)
    with open(f"{config.out}.parts/000001.npy", "r+b") as file:
        file.truncate(200)  # a damaged part is made again
    shown = []
    found = embed_images(config, progress=lambda done, total: shown.append((done, total)))
    assert len(calls) == 5  # parts 1 and 2
    np.testing.assert_array_equal(found.features, whole)
    assert shown == [(4, 10), (8, 10), (10, 10)]
    assert not os.path.exists(f"{config.out}.parts")


@pytest.mark.parametrize("change", ["size", "images", "file"])
def test_parts_of_another_embedding_are_ignored(config, photos, tmp_path, monkeypatch, change):
    copy = tmp_path / "copy"
    copy.mkdir()
    for index in range(10):
        (copy / f"{index}.png").write_bytes((photos / f"{index}.png").read_bytes())
    config = dataclasses.replace(config, images=[str(copy)])
    monkeypatch.setattr(embedding, "write_embeddings", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        embed_images(config)
    monkeypatch.undo()
    if change == "size":
        config = dataclasses.replace(config, size=24)
    elif change == "images":
        (copy / "9.png").unlink()
    else:
        Image.new("RGB", (48, 40), "red").save(copy / "0.png")
    found = embed_images(config)
    np.testing.assert_array_equal(found.features, embed_images(config, keep=False).features)


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_embeddings_round_trip(tmp_path, ending):
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    features = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    written = Embeddings(features, ("/a/ü.png", "/b c.png", "/d.png"), {"checkpoint": "x", "size": 32})
    write_embeddings(str(tmp_path / f"e{ending}"), written)
    found = read_embeddings(str(tmp_path / f"e{ending}"))
    np.testing.assert_array_equal(found.features, features)
    assert (found.paths, found.settings) == (written.paths, written.settings)


def test_non_utf8_names_are_kept_in_npz(tmp_path):
    written = Embeddings(np.ones((1, 2), np.float32), ("/\udcff.png",), {})
    write_embeddings(str(tmp_path / "e.npz"), written)
    assert read_embeddings(str(tmp_path / "e.npz")).paths == ("/\udcff.png",)
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=r"write \.npz"):
        write_embeddings(str(tmp_path / "e.parquet"), written)
    assert [path.name for path in tmp_path.iterdir()] == ["e.npz"]


def test_unsupported_outputs_are_refused_before_any_work(config, monkeypatch):
    with pytest.raises(ValueError, match=r"ends in \.csv; allowed: \.npz, \.parquet"):
        embed_images(dataclasses.replace(config, out="e.csv"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fastuft\[parquet\]'"):
        embed_images(dataclasses.replace(config, out="e.parquet"))


def test_bad_files_are_named_or_left_out(config, photos, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes((photos / "0.png").read_bytes()[:60])
    mixed = dataclasses.replace(config, images=[str(photos), str(bad)])
    with pytest.raises(ValueError, match=r"bad\.png"):
        embed_images(mixed)
    found = embed_images(dataclasses.replace(mixed, on_bad_file="skip"))
    assert len(found.paths) == 10 and list(found.bad_files) == [str(bad)]
    with pytest.raises(ValueError, match="all 1 images are bad"):
        embed_images(dataclasses.replace(config, images=[str(bad)], on_bad_file="skip"))


NOT_EMBEDDINGS = {
    "empty": b"",
    "cut": b"PK",
    "another archive": {"features": np.ones((2, 3))},
    "other numbers": {"features": np.ones((2, 3), "f4"), "paths": np.array(["a"])},
    "not finite": {"features": np.full((1, 3), np.nan, "f4"), "paths": np.array(["a"]), "settings": np.array("{}")},
    "objects": {"features": np.ones((1, 3), "f4"), "paths": np.array([{}], object), "settings": np.array("{}")},
}


@pytest.mark.parametrize("content", NOT_EMBEDDINGS.values(), ids=NOT_EMBEDDINGS)
def test_files_without_embeddings_are_refused(tmp_path, content):
    file = tmp_path / "e.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.savez(file, **content)
    with pytest.raises(ValueError, match="does not have embeddings"):
        read_embeddings(str(file))


def test_other_suffixes_are_embedded_when_named(config, photos, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    Image.open(photos / "7.png").save(folder / "seven.tif")
    with pytest.raises(ValueError, match="has no images"):
        embed_images(dataclasses.replace(config, images=[str(folder)]))
    wanted = dataclasses.replace(config, images=[str(folder)], suffixes=(".tif",))
    assert embed_images(wanted, keep=False).paths == (str(folder / "seven.tif"),)


def test_a_file_of_the_wrong_kind_is_reported_with_its_option():
    with pytest.raises(ValueError, match=r"in='list\.txt' ends in \.txt; allowed: \.npz, \.parquet"):
        read_embeddings("list.txt")


def test_a_pipe_is_not_an_embeddings_file(tmp_path):
    os.mkfifo(tmp_path / "e.npz")
    with pytest.raises(ValueError, match=r"e\.npz is not a file; name one that `fastuft embed` wrote"):
        read_embeddings(str(tmp_path / "e.npz"))


def test_impossible_sizes_are_refused_before_allocation(config):
    with pytest.raises(
        ValueError, match=r"size=1000000 and resize=1142857 with 3 images per batch need .*TB, but there are"
    ):
        embed_images(dataclasses.replace(config, size=1_000_000))
    with pytest.raises(ValueError, match=r"threads=1000000000 is out of range; allowed: \[0, 1024\]"):
        dataclasses.replace(config, threads=10**9)


@pytest.fixture
def collection(config, capsys):
    words = ["embed", *config.images, "--checkpoint", config.checkpoint, "--out", config.out, "--loader", "torch"]
    assert main(words) == 0
    assert "10 images, " in capsys.readouterr().out
    return config.out


def test_search_prints_the_nearest_images(collection, photos, capsys):
    assert main(["search", str(photos / "7.png"), "--in", collection, "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(photos / "7.png") and len(lines) == 4
    assert lines[1].split() == ["1.0000", str(photos / "7.png")]
    similarities = [float(line.split()[0]) for line in lines[1:]]
    assert similarities == sorted(similarities, reverse=True)


def test_search_takes_other_suffixes(collection, photos, tmp_path, capsys):
    Image.open(photos / "7.png").save(tmp_path / "seven.tif")
    words = ["search", str(tmp_path), "--in", collection, "--top", "1", "--suffixes", ".tif"]
    assert main(words) == 0
    assert str(photos / "7.png") in capsys.readouterr().out


def test_search_with_other_weights_is_refused(collection, photos, tmp_path, capsys):
    torch.manual_seed(1)
    export_backbone(build_backbone("resnet_tiny", "small"), tmp_path / "other.safetensors")
    words = ["search", str(photos / "7.png"), "--in", collection, "--checkpoint", str(tmp_path / "other.safetensors")]
    assert main(words) == 2
    assert "does not have the weights" in capsys.readouterr().err


def test_searching_a_file_without_settings_is_refused(photos, tmp_path, capsys):
    np.savez(
        tmp_path / "e.npz", features=np.ones((1, 3), "f4"), paths=np.array(["a"]), settings=np.array(json.dumps({}))
    )
    assert main(["search", str(photos / "7.png"), "--in", str(tmp_path / "e.npz")]) == 2
    assert "lacks settings" in capsys.readouterr().err


def test_the_help_of_search_shows_how_to_give_the_file(capsys):
    assert main(["search", "--help"]) == 0
    assert "--in" in capsys.readouterr().out.split()


def test_embedding_imports_neither_charts_nor_scikit_learn():
    code = "import sys, fastuft.jobs; assert not {'matplotlib', 'sklearn', 'jinja2', 'nvidia.dali'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
