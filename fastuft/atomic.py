"""Files that are whole or absent, however many processes write them and whenever one of them is killed."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAME_BYTES = 160  # how much of the file's name its partial file's name has: file systems allow 255 bytes
_PARTIAL = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{32}\.partial$")
_FOREIGN_AGE = 24 * 3600.0  # seconds; an older partial file of a process out of reach is a leftover


@contextmanager
def whole_file(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Write beside ``path``, then rename: a reader sees the old file or the new one, never part of one.

    Yields a path in the same folder that no other writer uses, for the body to write; its suffix is ``.partial``.
    When the body ends, that file replaces ``path``; if the body raises, the file is removed.

    Args:
        path: the file to write; its folder must exist.
        flush: wait until the content and the new name are on the disk, so that they survive a power failure. Without
            it, thousands of small files are written in seconds, but a power failure may leave an empty file.

    Raises:
        OSError: the file could not be written (disk full, folder removed); the old file is unchanged, nothing is left over.
    """
    partial = _partial_beside(path)
    try:
        yield partial
        if flush:
            _flush(partial)
        partial.replace(path)
        if flush:
            _flush(path.parent)  # the new name is on the disk too
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes | memoryview, *, flush: bool = True) -> None:
    """Write ``content`` as :func:`whole_file` does.

    Raises:
        OSError: the file could not be written (disk full, folder removed); the old file is unchanged, nothing is left over.
    """
    with whole_file(path, flush=flush) as partial:
        partial.write_bytes(content)


def remove_leftovers(folder: Path) -> None:
    """Remove the partial files in ``folder`` whose writers were killed; files that are being written stay.

    The name of a partial file names its writer. The file is a leftover if that process is gone. If the process ran on
    another machine, in another container or before a reboot, the file is a leftover after a day without writes.
    """
    for path in folder.glob("*.partial"):
        with suppress(OSError):  # already gone, or not ours to remove: it does no harm
            if _is_leftover(path):
                path.unlink()


def _is_leftover(path: Path) -> bool:
    writer = _PARTIAL.search(path.name)
    if writer is None:
        return False
    if writer[1] == _process_space():
        return not _lives(int(writer[2]))
    # By the file system's clock: this machine's may be days away from the writer's, or jump.
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime > _FOREIGN_AGE


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _partial_beside(path: Path) -> Path:
    own = os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])
    return path.with_name(f"{own}.{_process_space()}-{os.getpid()}-{uuid.uuid4().hex}.partial")


@functools.cache
def _process_space() -> str:
    """Digest of what makes process numbers comparable: the machine, its boot, and the container's numbering."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.blake2b("\n".join(parts).encode(errors="surrogateescape"), digest_size=4).hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
