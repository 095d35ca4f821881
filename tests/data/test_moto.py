"""Shards in moto's S3, a server that is independent of the tests' own."""

from __future__ import annotations

from pathlib import Path

import pytest
from shard_cases import pack

from fastuft.data import BadImageError, Manifest, list_images, read_bytes
from fastuft.data.sources import remote

pytestmark = pytest.mark.peers
boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")


def test_shards_in_s3_equal_the_folder(folders, tmp_path, monkeypatch):
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    names = {"ENDPOINT": url, "ACCESS_KEY_ID": "an-id", "SECRET_ACCESS_KEY": "a-secret", "ALLOW_HTTP": "true"}
    for name, value in names.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    remote._bucket.cache_clear()
    try:
        pack(folders[0], tmp_path / "shards", "t", 3)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        for shard in sorted((tmp_path / "shards").iterdir()):
            client.upload_file(str(shard), "bucket", f"set/{shard.name}")
        local = list_images(folders[0])
        for text in ("s3://bucket/set/t-{00..02}.tar", "s3://bucket/set/", "s3://bucket/set/t-*.tar"):
            found = list_images(text)
            assert [read_bytes(path) for path in found] == [Path(path).read_bytes() for path in local]
            assert Manifest.build(text).content_hash == Manifest.build(folders[0]).content_hash
        client.put_object(Bucket="bucket", Key="set/t-01.tar", Body=b"another")
        with pytest.raises(BadImageError, match=r"the shard t-01.tar has changed since it was listed"):
            read_bytes(next(path for path in found if "t-01.tar" in path))
    finally:
        server.stop()
        remote._bucket.cache_clear()
