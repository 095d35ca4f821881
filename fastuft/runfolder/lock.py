"""One run per folder: a lock of the operating system, which is released when its process ends, however it ends."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # not a POSIX system: the folder cannot be locked, and a warning says so
    fcntl = None  # type: ignore[assignment]

_PATIENCE = 2.0  # seconds to wait for a process that is just ending, as before an elastic restart
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_own: set[Path] = set()  # locks of this process: the system would grant it the same lock again


class FolderInUseError(ValueError):
    """Another run works in the folder; the message names its host, process and start time."""


class FolderLostError(ValueError):
    """The folder was removed or replaced while a run worked in it."""


class RunLock:
    """Holds a folder for this process during a ``with`` block.

    It is a POSIX record lock on a file in the folder: children do not inherit it, NFS supports it, and the system
    releases it when the process dies. If the file system has no locks, one warning says so and nothing is held.

    Args:
        folder: the folder; it is created if needed, and removed again at the end if it is empty.
        file: the lock file in it, with the host, process and start time of the holder as JSON.
    """

    def __init__(self, folder: Path, file: Path) -> None:
        self._folder, self._file = folder, file
        self._handle: int | None = None
        self._identity: tuple[int, int] | None = None

    def __enter__(self) -> RunLock:
        """
        Raises:
            FolderInUseError: another run works in the folder.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._file.parent.resolve() / self._file.name
        found = self._folder.stat()
        self._identity = (found.st_dev, found.st_ino)
        give_up = time.monotonic() + _PATIENCE
        while self._file in _own or not self._try():
            if time.monotonic() > give_up:
                raise FolderInUseError(
                    f"out={str(self._folder)!r} is in use by another run{self._holder()}; wait for it "
                    "to end, stop it, or choose another folder"
                )
            time.sleep(0.1)
        _own.add(self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _own.discard(self._file)
        if self._handle is None:
            return
        with suppress(OSError):  # already removed
            self._file.unlink()
        os.close(self._handle)  # releases the lock
        self._handle = None
        with suppress(OSError):  # not empty: the usual case
            self._folder.rmdir()

    def check(self) -> None:
        """Check that the folder is still the one that was locked.

        Raises:
            FolderLostError: it was removed or replaced.
        """
        try:
            found = self._folder.stat()
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self._identity:
            raise FolderLostError(
                f"out={str(self._folder)!r} was removed or replaced while the run worked in it, so what was saved there "
                "is lost; start the run again"
            )

    def _try(self) -> bool:
        """Try once to lock the file; False if another process holds it."""
        handle = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no file locks on this system")
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is(handle):  # its last holder removed the file between our two calls
                os.close(handle)
                return False
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps(_identity_of_this_process()).encode())
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(
                f"out={str(self._folder)!r} is on a file system without locks ({error.strerror}), so a second run could "
                "work in it unnoticed",
                stacklevel=3,
            )
            return True
        self._handle = handle
        return True

    def _is(self, handle: int) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.fstat(handle), os.stat(self._file))
        return False

    def _holder(self) -> str:
        if self._file in _own:
            return " of this process"
        try:
            holder = json.loads(self._file.read_text(encoding="utf-8"))
            return f" (process {int(holder['pid'])} on {str(holder['host'])!r}, since {str(holder['since'])!r})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""


def _identity_of_this_process() -> dict[str, str | int]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
