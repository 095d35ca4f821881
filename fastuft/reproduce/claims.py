"""Several processes in one output folder: each part of the work is done by one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def claim(folder: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone may do the named part until the block ends.

    A lock of the operating system on a file below ``folder``: it is freed when its process ends, however it ends, and it
    holds among machines where the file system passes locks on, as NFS, Lustre (mounted with flock) and GPFS do.

    Args:
        folder: output folder that the processes share.
        name: of the part.
        wait: wait until the part is free; then the answer is always true.

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
