"""Every kind of source in every command that reads images: results equal those of the folder bitwise."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data.object_server import ObjectServer
from data.shard_cases import pack
from small_job import write_small_job

from fastuft import messages
from fastuft.cli import main
from fastuft.data import labeled_folder
from fastuft.data.sources import remote

KINDS = ["folder", "list", "tar", "parquet", "arrow", "s3", "http", "s3 images", "s3 arrow", "http parquet"]


def write_tables(folder: Path, place: Path) -> None:
    """Write the folder's images in order to two parquet and two Arrow files with bytes and class labels."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    paths, labels, names = labeled_folder(str(folder))
    about = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    for number, rows in enumerate((slice(0, 7), slice(7, None))):
        images = [{"bytes": Path(path).read_bytes(), "path": Path(path).name} for path in paths[rows]]
        table = pa.table({"image": images, "label": pa.array(labels[rows], pa.int64())})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": about}})})
        for suffix in ("parquet", "arrow"):
            (place / suffix).mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, place / "parquet" / f"data-{number:05d}-of-00002.parquet", row_group_size=3)
        with pa.ipc.new_stream(str(place / "arrow" / f"data-{number:05d}-of-00002.arrow"), table.schema) as file:
            file.write_table(table, max_chunksize=3)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A small job whose folders also exist as every other kind of source; ``sources[kind]`` names them."""
    root = write_small_job(tmp_path_factory.mktemp("job"))
    sources = {kind: {} for kind in KINDS}
    with ObjectServer().serving() as server:
        for name in ("photos", "test", "source"):
            folder, packed = root / name, root / "packed" / name
            pack(str(folder), packed / "tar", "x", 2)
            write_tables(folder, packed)
            (root / f"{name}.txt").write_text(
                "\n".join(os.path.relpath(p, root) for p in labeled_folder(str(folder))[0])
            )
            server.put_folder(packed, f"bucket/{name}")
            server.put_folder(folder, f"bucket/{name}/images")
            web = f"{server.url}/bucket/{name}"
            sources["folder"][name], sources["list"][name] = str(folder), str(root / f"{name}.txt")
            sources["tar"][name] = f"{packed}/tar/x-{{00..01}}.tar"
            sources["parquet"][name], sources["arrow"][name] = f"{packed}/parquet", f"{packed}/arrow/*.arrow"
            sources["s3"][name], sources["http"][name] = f"s3://bucket/{name}/tar/", f"{web}/tar/x-{{00..01}}.tar"
            sources["s3 images"][name] = f"s3://bucket/{name}/images/"
            sources["s3 arrow"][name] = f"s3://bucket/{name}/arrow/"
            sources["http parquet"][name] = f"{web}/parquet/data-{{00000,00001}}-of-00002.parquet"
        yield SimpleNamespace(root=root, sources=sources, server=server)


@pytest.fixture(autouse=True)
def own_world(job, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setattr(messages, "_said", set())
    values = {
        "ENDPOINT": job.server.url,
        "ACCESS_KEY_ID": "an-id",
        "SECRET_ACCESS_KEY": "a-secret",
        "ALLOW_HTTP": "true",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    remote._bucket.cache_clear()
    yield
    remote._bucket.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_verify_data_and_embed_take_every_kind_of_source(job, tmp_path, capsys, kind):
    def features(source, out):
        given = [source["photos"], "--checkpoint", str(job.root / "start.safetensors"), "--size", "32"]
        assert main(["embed", *given, "--loader", "torch", "--out", str(out)]) == 0
        with np.load(out, allow_pickle=False) as found:
            return found["features"], [str(path) for path in found["paths"]]

    assert main(["verify-data", job.sources[kind]["photos"], "--decode", "true"]) == 0
    assert "all 24 files are good" in capsys.readouterr().out
    ours, paths = features(job.sources[kind], tmp_path / "ours.npz")
    theirs, _ = features(job.sources["folder"], tmp_path / "theirs.npz")
    assert np.array_equal(ours, theirs) and len(paths) == 24


def outcome(job, source, place):
    """(losses of two steps of finetuning, metrics of the run's evaluation)."""
    options = ["--config", str(job.root / "photos.yaml"), "--init", str(job.root / "start.safetensors")]
    named = ["--target", source["photos"], "--source", source["source"]]
    assert main(["finetune", *options, *named, "--max_steps", "2", "--out", str(place / "run")]) == 0
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    options = ["--config", str(job.root / "eval.yaml"), "--checkpoint", str(place / "run")]
    named = ["--train", source["photos"], "--test", source["test"], "--source", source["source"]]
    assert main(["eval", *options, *named, "--out", str(place / "eval")]) == 0
    return [row["loss"] for row in rows if row["kind"] == "train"], json.loads(
        (place / "eval" / "eval.json").read_text()
    )


@pytest.fixture(scope="module")
def of_folder(job, tmp_path_factory):
    return outcome(job, job.sources["folder"], tmp_path_factory.mktemp("folder"))


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore:method.queue_size")
@pytest.mark.parametrize(
    "kind", [kind if kind in ("tar", "s3 arrow") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:]]
)
def test_finetune_and_eval_take_every_kind_of_source(job, of_folder, tmp_path, kind):
    losses, figures = outcome(job, job.sources[kind], tmp_path)
    expected_losses, expected = of_folder
    assert losses == expected_losses and len(losses) == 2
    if kind == "list":  # a list has no classes
        assert "retrieval" not in figures and figures["label_free"] == expected["label_free"]
    else:
        names = [name for name in expected if name not in ("config", "settings", "checkpoint", "timings")]
        assert {name: figures[name] for name in names} == {name: expected[name] for name in names}
