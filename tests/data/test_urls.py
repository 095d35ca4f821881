"""Images behind URLs equal the folder's, whatever the network does; no text contains credentials."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from object_server import ObjectServer
from shard_cases import pack, write_tar
from stream_cases import LOADERS, assert_ranks_make_the_batches, plain, stream_of

from fastuft import messages
from fastuft.config import DataConfig
from fastuft.data import (
    BadImageError,
    EvalStream,
    Manifest,
    labeled_folder,
    list_images,
    listings_agreed,
    read_bytes,
    verify_files,
)
from fastuft.data.sources import remote


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    pack(folders[0], folder / "target", "t", 3)
    pack(folders[1], folder / "source", "s", 4)
    with ObjectServer().serving() as serving:
        serving.put_folder(folder, "bucket/shards")
        serving.put_folder(Path(folders[0]), "bucket/photos")
        yield serving


@pytest.fixture(autouse=True)
def own_world(server, tmp_path, monkeypatch):
    """No waiting, an empty cache, and the server's address in the environment variables of S3 clients."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setattr(messages, "_said", set())
    monkeypatch.setattr(remote, "_failures", 0)
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.005)
    for name, value in {"ENDPOINT": server.url, "ACCESS_KEY_ID": "an-id", "SECRET_ACCESS_KEY": "a-secret"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    remote._bucket.cache_clear()
    server.faults.clear()
    server.storm = 0
    server.asked.clear()
    server.headers.clear()


SHARDS = ("shards/target/t-{00..02}.tar", "shards/source/s-{00..03}.tar")


def locations(server, scheme):
    base = {"s3": "s3://bucket", "http": f"{server.url}/bucket"}[scheme]
    return [f"{base}/{name}" for name in SHARDS]


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_shards_behind_urls_equal_the_folder(server, folders, scheme):
    target, source = locations(server, scheme)
    ours, theirs = list_images(source), list_images(folders[1])
    assert [path.split(".tar/")[1] for path in ours] == [os.path.relpath(path, folders[1]) for path in theirs]
    assert [read_bytes(path) for path in ours] == [Path(path).read_bytes() for path in theirs]
    assert all(path.startswith(source.partition("{")[0]) for path in ours)
    built = Manifest.build(target, source, fraction=0.3)
    assert built.content_hash == Manifest.build(*folders, fraction=0.3).content_hash
    assert labeled_folder(target)[1:] == labeled_folder(folders[0])[1:]
    assert verify_files(list_images(target), decode=True) == []


@pytest.mark.parametrize("loader", LOADERS)
def test_pixels_equal_the_folder_for_any_ranks_and_restarts(server, folders, loader):
    def batches(named, rank=0, world_size=1, start=0):
        manifest = Manifest.build(*named, fraction=0.3, seed=1)
        data = DataConfig(batch_size=16, loader=loader, threads=1)
        return list(stream_of(manifest, data, seed=3, rank=rank, world_size=world_size).epoch(1, start))

    whole, named = batches(folders), locations(server, "s3")
    for world_size in (1, 2, 4):
        ranks = [batches(named, rank, world_size) for rank in range(world_size)]
        assert_ranks_make_the_batches(whole, ranks)
    rest = batches(named, start=2)
    assert len(rest) == len(whole) - 2 and torch.equal(rest[-1].key, whole[-1].key)


@pytest.mark.parametrize("text", ["s3://bucket/photos/", "s3://bucket/photos", "s3://bucket/photos/**/*"])
def test_single_objects_equal_the_folder(server, folders, text):
    ours, theirs = list_images(text), list_images(folders[0])
    assert [path.removeprefix("s3://bucket/photos/") for path in ours] == [
        os.path.relpath(p, folders[0]) for p in theirs
    ]
    assert Manifest.build(text).content_hash == Manifest.build(folders[0]).content_hash
    views = [
        torch.cat([views for views, _ in EvalStream(paths, loading=plain("torch"), size=32)])
        for paths in (ours, theirs)
    ]
    assert torch.equal(*views)
    assert labeled_folder(text)[1:] == labeled_folder(folders[0])[1:]


def test_google_storage_is_read_through_its_client(server, folders, tmp_path, monkeypatch):
    """``gs://`` through obstore's client for it; the account's file says where the server is, as for local emulators."""
    account = {"gcs_base_url": server.url, "disable_oauth": True, "client_email": "", "private_key": "secret-key"}
    (tmp_path / "account.json").write_text(json.dumps(account | {"private_key_id": ""}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    for text in ("gs://bucket/shards/target/t-{00..02}.tar", "gs://bucket/shards/target/", "gs://bucket/**/t-*.tar"):
        found = list_images(text)
        assert [read_bytes(path) for path in found] == [Path(path).read_bytes() for path in list_images(folders[0])]
        assert Manifest.build(text).content_hash == Manifest.build(folders[0]).content_hash
    assert found[0].startswith("gs://bucket/shards/target/t-0")
    assert type(remote.bucket_of(remote.Address.of(text))._store).__name__ == "GCSStore"
    server.faults["/bucket/shards/target/t-00.tar"] = [503, "cut"]
    assert read_bytes(next(path for path in found if "t-00.tar" in path))
    server.objects["/bucket/other/x.tar"] = write_tar(tmp_path / "x.tar", [("a.jpg", b"1" * 700)]).read_bytes()
    (path,) = list_images("gs://bucket/other/x.tar")
    server.objects["/bucket/other/x.tar"] = write_tar(tmp_path / "x.tar", [("a.jpg", b"2" * 700)]).read_bytes()
    with pytest.raises(BadImageError, match=r"x.tar has changed since it was"):
        read_bytes(path)
    server.storm = 403
    with pytest.raises(ValueError, match=r"is refused \(403 Forbidden\): check the credentials") as caught:
        list_images("gs://bucket/shards/target/")
    assert "secret-key" not in str(caught.value)


def test_objects_are_named_by_prefix_pattern_or_braces(server):
    expected = list_images(locations(server, "s3")[0])
    for text in ("s3://bucket/shards/target/", "s3://bucket/shards/target/*.tar", "s3://bucket/**/t-0[0-2].tar"):
        assert list_images(text) == expected
    assert len(list_images(f"{server.url}/bucket/photos/class0/000.jpg")) == 1
    with pytest.raises(ValueError, match=r"web servers cannot be listed; name objects"):
        list_images(f"{server.url}/bucket/photos/")
    with pytest.raises(ValueError, match=r"'ftp://host/x' is not supported; allowed: file, s3, gs, http, https"):
        list_images("ftp://user:word@host/x")
    with pytest.raises(ValueError, match=r"'s3://bucket/nothing/' has no images"):
        list_images("s3://bucket/nothing/")
    with pytest.raises(
        ValueError, match=r"1 of 2 objects cannot be used: s3://bucket/shards/target/t-03.tar does not exist"
    ):
        list_images("s3://bucket/shards/target/t-{02,03}.tar")


def test_processes_of_a_run_share_a_listing(server):
    """The main one asks; the others take its answer, also when it is an error, and see what it saw."""
    said = []

    def main(make):
        said.append(make())
        return said[-1]

    for text in (
        "s3://bucket/shards/target/",
        locations(server, "s3")[0],
        f"{server.url}/bucket/shards/target/t-00.tar",
    ):
        with listings_agreed(main):
            ours = list_images(text)
        server.asked.clear()
        with listings_agreed(lambda make: said[-1]):
            theirs = list_images(text)
        assert ours == theirs and not server.asked
        assert read_bytes(theirs[3]) == read_bytes(ours[3])
    assert list_images("s3://bucket/shards/target/") and server.asked  # outside, each asks for itself
    server.storm = 404
    with listings_agreed(main), pytest.raises(ValueError, match="does not exist"):
        list_images(text)


def test_credentials_are_used_and_never_shown(server, tmp_path, capsys):
    """A login and a signature reach the server but no text: paths, the manifest, reported failures and errors."""
    base = server.url.replace("http://", "http://someone:pass%2Fword@")
    path = "/bucket/shards/target/t-00.tar"
    server.faults[path] = [0, 503]
    text = f"{base}{path}?X-Signature=s3cr3t&more=1"
    found = list_images(text)
    server.faults[path] = [503]
    assert read_bytes(found[0])
    assert all(headers["query"] == "X-Signature=s3cr3t&more=1" for headers in server.headers)
    basic = {headers["authorization"] for headers in server.headers}
    assert basic == {"Basic c29tZW9uZTpwYXNzL3dvcmQ="}
    Manifest.build(text).save(tmp_path / "manifest.json")
    server.faults[path] = [403]
    with pytest.raises(
        BadImageError, match=r"t-00.tar/class0.*is refused \(403 Forbidden\): check the credentials"
    ) as caught:
        read_bytes(found[0])
    server.storm = 404
    with pytest.raises(ValueError, match="does not exist") as missing:
        list_images(text)
    texts = [str(caught.value), repr(caught.value.__cause__), str(missing.value), *found, capsys.readouterr().err]
    texts += [(tmp_path / "manifest.json").read_text(), repr(caught.value.__cause__.__cause__)]
    assert not any(word in text for text in texts for word in ("someone", "pass", "s3cr3t", "a-secret"))
    assert json.loads(texts[-2])["paths"][0].startswith(f"{server.url}/bucket/shards/target/t-00.tar/class0/")


def test_transient_failures_are_retried_and_reported(server, capsys):
    """One line per failure names shard and member; a truncated body is read again."""
    found = list_images(locations(server, "s3")[0])
    shard, member = found[7].partition(".tar")[0] + ".tar", found[7].split(".tar/")[1]
    server.faults[shard.replace("s3:/", "")] = [503, "cut", 500, 429]
    assert read_bytes(found[7])
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{shard}/{member} was not served (503 Service Unavailable); trying again"
    assert len([asked for asked in server.asked if asked[2].startswith("bytes=") and asked[0] == "GET"]) >= 5


@pytest.mark.parametrize("loader", LOADERS)
def test_persistent_failures_end_in_an_error_or_a_counted_skip(server, loader, monkeypatch):
    monkeypatch.setattr(remote, "_TRIES", 3)
    target = locations(server, "s3")[0]

    def stream(on_bad_file):
        return stream_of(Manifest.build(target), DataConfig(batch_size=8, loader=loader, on_bad_file=on_bad_file))

    first, second = stream("error"), stream("skip")
    server.faults["/bucket/shards/target/t-01.tar"] = [503] * 1000
    with pytest.raises(BadImageError, match=r"t-01.tar/class.*the shard t-01.tar was not served \(503 .*\), 3 times"):
        list(first.epoch(0))
    assert len(list(second.epoch(0))) == second.steps_per_epoch
    assert second.bad_files and all("t-01.tar/" in bad.path and "503" in bad.reason for bad in second.bad_files)
    server.storm = 503
    with pytest.raises(ValueError, match=r"3 of 3 objects cannot be used: .*t-00.tar was not served \(503"):
        list_images(target)


def test_a_hanging_server_is_given_up(server, monkeypatch):
    monkeypatch.setattr(remote, "_ANSWER", 0.2)
    monkeypatch.setattr(remote, "_TRIES", 2)
    remote._bucket.cache_clear()
    found = list_images(locations(server, "s3")[0])
    server.faults["/bucket/shards/target/t-00.tar"] = ["hang"] * 2
    slow = next(path for path in found if "t-00.tar" in path)
    began = time.monotonic()
    with pytest.raises(BadImageError, match="was not served in time, 2 times"):
        read_bytes(slow)
    assert time.monotonic() - began < 2
    assert read_bytes(slow)


def test_a_server_without_ranges_is_refused(server):
    found = list_images(locations(server, "http")[0])
    server.faults["/bucket/shards/target/t-00.tar"] = ["ignore"]
    with pytest.raises(BadImageError, match="the server ignores ranges"):
        read_bytes(next(path for path in found if "t-00.tar" in path))


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_changed_etag_is_detected(server, scheme, tmp_path):
    """During a run it makes a bad file; the next start builds a new index."""
    folder = f"/bucket/other/{scheme}.tar"
    one = write_tar(tmp_path / "x.tar", [("a.jpg", b"1" * 700)])
    server.objects[folder] = one.read_bytes()
    text = f"s3:/{folder}" if scheme == "s3" else server.url + folder
    (path,) = list_images(text)
    assert read_bytes(path) == b"1" * 700
    server.objects[folder] = write_tar(one, [("a.jpg", b"2" * 700)]).read_bytes()
    with pytest.raises(BadImageError, match=r"tar/a.jpg: cannot be read \(the shard \w+.tar has changed since"):
        read_bytes(path)
    assert read_bytes(list_images(text)[0]) == b"2" * 700


def test_the_index_is_cached_and_the_draw_reads_no_image(server):
    target, source = locations(server, "s3")
    Manifest.build(target, source)
    server.asked.clear()
    assert Manifest.build(target, source).num_source == 9
    assert {method for method, _, _ in server.asked} == {"HEAD"} and len(server.asked) == 7


def test_drawn_members_are_copied_once_and_read_from_the_copies(server, folders, tmp_path):
    _, source = locations(server, "s3")
    first = Manifest.build(folders[0], source, replay_cache=str(tmp_path / "copies"))
    assert first.content_hash == Manifest.build(*folders).content_hash
    server.asked.clear()
    again = Manifest.build(folders[0], source, replay_cache=str(tmp_path / "copies"))
    assert again == first and not [asked for asked in server.asked if asked[0] == "GET"]
    assert all(Path(path).is_file() for path in again.paths)


def test_missing_obstore_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ValueError, match=r"s3://bucket/: URLs need obstore; pip install 'fastuft\[remote\]'"):
        list_images("s3://bucket/photos/")
