"""Several processes share one output folder, and each part of the work is done by only one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def claim(folder: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process may do the named part, exclusively, until the block ends.

    It is a lock of the operating system on a file below ``folder``. It is released when its process ends, however it ends,
    and works across machines if the file system supports locks, as NFS, Lustre (mounted with flock) and GPFS do.

    Args:
        folder: the output folder that the processes share.
        name: name of the part.
        wait: wait until the part is free; the answer is then always true.

    Raises:
        ValueError: the file system has no locks.
    """
    file = folder / "locks" / f"{name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    except (NotImplementedError, OSError) as error:
        raise ValueError(
            f"out={str(folder)!r} is on a file system without locks ({error}); choose another out"
        ) from error
    try:
        yield True
    finally:
        lock.release()
