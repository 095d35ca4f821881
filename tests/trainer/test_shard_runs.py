"""Training over shards and URLs equals training over the folder, despite kills and on any number of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data.object_server import ObjectServer
from data.shard_cases import pack
from processes import AT_STEP, ROOT, environment, finish, run, start, write_config
from run_results import assert_same_state, final, rows

from fastuft.data.sources import remote
from fastuft.trainer import train

pytestmark = [pytest.mark.filterwarnings("ignore:method.queue_size"), pytest.mark.e2e]


@pytest.fixture
def locations(folders, tmp_path, monkeypatch):
    """(target, source) as a folder, as tar shards, in a bucket and behind a web server; and the server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    packed = pack(folders[0], tmp_path / "shards", "t", 3), pack(folders[1], tmp_path / "shards", "s", 4)
    with ObjectServer().serving() as server:
        server.put_folder(tmp_path / "shards", "bucket/shards")
        for name, value in {"ENDPOINT": server.url, "ACCESS_KEY_ID": "an-id", "SECRET_ACCESS_KEY": "a-secret"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        remote._bucket.cache_clear()
        names = [os.path.basename(text) for text in packed]
        yield (
            {
                "folder": folders,
                "tar": packed,
                "s3": [f"s3://bucket/shards/{name}" for name in names],
                "http": [f"{server.url}/bucket/shards/{name}" for name in names],
            },
            server,
        )
        remote._bucket.cache_clear()


def configuration(tiny, tmp_path, location, name, **changes):
    target, source = location
    return tiny(target=target, source=source, out=str(tmp_path / name), resume="auto", **changes)


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_a_run_killed_over_shards_and_urls_equals_the_run_over_the_folder(tiny, locations, tmp_path, loader):
    """A run is killed within an epoch over tar shards, again over s3 with failures, and ends over http, bitwise equal."""
    found, server = locations
    changes = {"data": {"loader": loader, "replay_fraction": 0.5}, "runtime": {"save_every": 3}}

    def config(kind, name):
        return configuration(tiny, tmp_path, found[kind], name, **changes)

    whole = train(config("folder", "whole")).run_dir
    shard = "/bucket/shards/t-01.tar"
    for kind, calls in (("tar", 5), ("s3", 3)):
        server.faults[shard] = [503, "cut", 0, 500]
        (status, output), *_ = run(
            write_config(config(kind, "killed"), tmp_path / "c.yaml"), 1, AT_STEP.format(calls=calls, part="optimizer")
        )
        assert status == -9, output
    ended = train(config("http", "killed")).run_dir
    assert_same_state(final(whole), final(ended))
    assert rows(ended) == rows(whole) and len(rows(ended)) == 8
    assert any(asked[0] == "GET" for asked in server.asked)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["s3", pytest.param("tar", marks=pytest.mark.slow)])
def test_ranks_over_shards_equal_one_rank_over_the_folder(tiny, locations, tmp_path, world_size, kind):
    """Equal up to rounding, as over a folder; one rank per machine builds the index of a shard."""
    # Statistics over four images amplify rounding from step to step; a low rate keeps it rounding.
    changes = {
        "model": {"bn": "split", "bn_group": 4},
        "optim": {"epochs": 1, "lr": 0.005},
        "method": {"queue_size": 72},
    }
    found, server = locations
    one = train(configuration(tiny, tmp_path, found["folder"], "one", **changes)).run_dir
    many = configuration(tiny, tmp_path, found[kind], "many", **changes)
    results = finish(start(write_config(many, tmp_path / "c.yaml"), world_size), timeout=400)
    assert [status for status, _ in results] == [0] * world_size, results
    left, right = final(one), final(tmp_path / "many")
    for part in ("model", "queue"):
        torch.testing.assert_close(left[part], right[part], rtol=1e-3, atol=1e-4)
    losses = [torch.tensor([row["loss"] for row in rows(folder)]) for folder in (one, tmp_path / "many")]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert len([asked for asked in server.asked if asked[0] == "HEAD"]) == (7 if kind == "s3" else 0)  # one rank asks
    assert left["images"] == right["images"] and len(right["rank_buffers"]) == world_size
    assert len(list((tmp_path / "user-cache" / "fastuft" / "shards").glob("*.npz"))) == 7


COPIER = """
import json, os, signal, sys, threading
from fastuft.atomic import whole_file
from fastuft.data import Manifest, manifest
target, source, cache, deadly = sys.argv[1:]
if int(deadly):
    real, copies, lock = manifest._write_compared, [], threading.Lock()
    def written(location, content):
        with lock:  # no copy starts after the deadly one
            copies.append(location)
            if len(copies) == int(deadly):
                with whole_file(location) as partial:
                    partial.write_bytes(content[: len(content) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
        real(location, content)
    manifest._write_compared = written
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(list(Manifest.build(target, source, fraction=1.0, replay_cache=cache).paths)))
"""


@pytest.mark.parametrize("kind", ["tar", "s3"])
def test_replayed_members_are_copied_once_for_all_ranks_despite_kills(locations, tmp_path, kind):
    """A run is killed while copying; of three resumed ranks one copies; only a damaged copy is made again."""
    found, server = locations
    cache = tmp_path / "copies"

    def copier(deadly=0):
        arguments = [*found[kind], str(cache), str(deadly)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment()}
        process = subprocess.Popen([sys.executable, "-c", COPIER, *arguments], **pipes)
        assert process.stdout.readline() == "ready\n"
        return process

    def recorded():
        return [json.loads(line)[0] for line in (cache / "index.jsonl").read_text().splitlines()]

    process = copier(deadly=17)
    process.communicate("\n")
    assert process.returncode == -9
    before = recorded()
    assert 1 <= len(before) <= 16 and list(cache.glob("*.partial"))
    server.asked.clear()
    processes = [copier() for _ in range(3)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    paths = [json.loads(process.communicate()[0]) for process in processes]
    assert paths[0] == paths[1] == paths[2] and not list(cache.glob("*.partial"))
    assert sorted(recorded()) == sorted({*recorded()}) and len(recorded()) == 48  # each copied once
    members = sorted(Path(found["folder"][1]).rglob("*.png"))
    assert [Path(path).read_bytes() for path in paths[0][40:]] == [path.read_bytes() for path in members]
    if kind == "s3":  # only the members that were not copied yet are read, by one of the ranks
        assert len([asked for asked in server.asked if asked[0] == "GET"]) == 48 - len(before)
    damaged = Path(paths[0][50])
    damaged.write_bytes(damaged.read_bytes()[:-1])
    process = copier()
    assert json.loads(process.communicate("\n")[0]) == paths[0]
    assert recorded()[48:] == [damaged.name] and damaged.read_bytes() == members[10].read_bytes()
