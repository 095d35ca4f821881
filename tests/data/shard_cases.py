"""Tar shards for the tests of sources."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            add(archive, name, content)
    return path


def contents(folder: str) -> list[tuple[str, bytes]]:
    """(name relative to the folder, bytes) of every file, not in the order of names."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return [
        (os.path.relpath(path, folder), path.read_bytes()) for path in sorted(paths, key=lambda path: path.name[::-1])
    ]


def pack(folder: str, out: Path, stem: str, count: int) -> str:
    """Write the folder's files to ``count`` shards ``stem-00.tar``, in turn; returns their names with braces."""
    members = contents(folder)
    for shard in range(count):
        write_tar(out / f"{stem}-{shard:02d}.tar", members[shard::count])
    return str(out / f"{stem}-{{00..{count - 1:02d}}}.tar")
