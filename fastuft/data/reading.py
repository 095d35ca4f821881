"""Reading files with a bounded pool of threads that a hanging file does not block."""

from __future__ import annotations

import errno
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from typing import Any, Generic, TypeVar

from fastuft.data.bad import BadImageError
from fastuft.data.images import Located, is_remote

READERS = 16  # threads that read files; on network storage they mostly wait
REMOTE_READERS = 64  # concurrent requests at the start; at 50 ms each, 1,280 images per second
MOST_READERS = 256  # upper limit of the threads that latency and rate require
READ_TIMEOUT = 60.0  # seconds that reading one file may take
LARGEST = 1 << 30  # bytes of an encoded image
_SMOOTHING = 0.02  # weight of the newest read in the mean latency
_PATIENCE = 0.05  # seconds between attempts to open a file while the process has too many open

Item = TypeVar("Item")
Result = TypeVar("Result")


def readers_for(paths: Sequence[str]) -> int:
    """Threads that read these images ahead."""
    return REMOTE_READERS if is_remote(paths) else READERS


def read_bytes(path: str) -> bytes:
    """The content of a regular file, or of an image in a shard.

    Only regular files are opened, because a pipe or a device may block forever.

    Raises:
        BadImageError: missing, unreadable, empty, larger than a gigabyte, or not a regular file.
    """
    if isinstance(path, Located):
        return path.read()
    try:
        _check_regular(path, os.stat(path).st_mode)
        file = _open(path)
        try:
            found = os.fstat(file)
            _check_regular(path, found.st_mode)  # it may have been replaced meanwhile
            if found.st_size > LARGEST:
                raise BadImageError(path, f"has {found.st_size} bytes, more than {LARGEST}")
            parts = []
            while part := os.read(file, found.st_size + 1):
                parts.append(part)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        if isinstance(error, BadImageError):
            raise
        raise BadImageError(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not parts:
        raise BadImageError(path, "is empty")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _check_regular(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise BadImageError(path, f"cannot be read (it is {kind}, not a file)")


def _open(path: str) -> int:
    """Open for reading; if the process has too many open files, wait until other threads close theirs."""
    give_up = time.monotonic() + READ_TIMEOUT
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or time.monotonic() > give_up:
                raise
            time.sleep(_PATIENCE)


class _Pending:
    """Stands for a result that is not available yet."""


_PENDING = _Pending()


class Reading(Generic[Item, Result]):
    """A batch of files being read: the result of ``function(item)`` for each, or the exception that it raised, in order."""

    def __init__(self, pool: ReaderPool, function: Callable[[Item], Result], items: Sequence[Item]) -> None:
        self._pool = pool
        self._function = function
        self.items = items
        self._results: list[Result | Exception | _Pending] = [_PENDING] * len(items)
        self._began = [0.0] * len(items)
        self._following = count()
        self._finished: list[int] = []
        self._over = threading.Event()
        if not items:
            self._over.set()

    def work(self) -> bool:
        """Read one file after the other until none is left; False if this thread was given up meanwhile."""
        while (row := next(self._following)) < len(self.items):
            self._began[row] = time.monotonic()
            found: Result | Exception
            try:
                found = self._function(self.items[row])
            except Exception as error:  # a failure concerns only its own file
                found = error
            if not self._finish(row, found):
                return False
        return True

    def _finish(self, row: int, found: Result | Exception) -> bool:
        with self._pool.lock:
            if not isinstance(self._results[row], _Pending):
                return False
            self._results[row] = found
            took = time.monotonic() - self._began[row]
            self._pool.latency += (took - self._pool.latency) * _SMOOTHING if self._pool.latency else took
        self._finished.append(row)
        if len(self._finished) == len(self.items):
            self._over.set()
        return True

    def results(self) -> list[Result | Exception]:
        """Wait for the results; a file that takes longer than the pool's timeout is given up with a TimeoutError."""
        while not self._over.wait(min(1.0, self._pool.timeout / 4)):
            now = time.monotonic()
            for row, began in enumerate(self._began):
                late = began and isinstance(self._results[row], _Pending) and now - began > self._pool.timeout
                if late and self._finish(row, TimeoutError(f"not read within {self._pool.timeout:g} seconds")):
                    self._pool.replace_thread(self)
        return [result for result in self._results if not isinstance(result, _Pending)]


class ReaderPool:
    """Threads that read files. A thread that hangs is given up and replaced; no thread keeps the process alive.

    Args:
        workers: number of threads; may be raised later.
        timeout: seconds that reading one file may take.
    """

    def __init__(self, workers: int = READERS, timeout: float = READ_TIMEOUT) -> None:
        self.workers = workers
        self.timeout = timeout
        self.lock = threading.Lock()
        self.latency = 0.0  # seconds that reading one file takes: a moving mean
        self._tasks: queue.SimpleQueue[Reading[Any, Any] | None] = queue.SimpleQueue()
        self._started = 0

    def read(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Reading[Item, Result]:
        """Start reading; see :class:`Reading`."""
        reading = Reading(self, function, items)
        wanted = min(self.workers, len(items))
        for _ in range(min(wanted, self.workers - self._started)):  # batches before this one may still occupy theirs
            self._start_thread()
        for _ in range(wanted):
            self._tasks.put(reading)
        return reading

    def replace_thread(self, reading: Reading[Any, Any]) -> None:
        """Start another thread for ``reading``, because one hangs."""
        self._tasks.put(reading)
        self._start_thread()

    def close(self) -> None:
        """Let the threads exit when their work is done."""
        for _ in range(self._started):
            self._tasks.put(None)
        self._started = 0

    def _start_thread(self) -> None:
        self._started += 1
        threading.Thread(target=self._serve, name="reader", daemon=True).start()

    def _serve(self) -> None:
        while (reading := self._tasks.get()) is not None and reading.work():
            pass


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, *, chunk: int = 256
) -> Iterator[Result]:
    """``map(function, items)`` with several threads, in order; chunks are the tasks, so millions of items are fine."""
    source = iter(items)

    def on_chunk(some: list[Item]) -> list[Result]:
        return [function(item) for item in some]

    with ThreadPoolExecutor(workers) as pool:
        for results in pool.map(on_chunk, iter(lambda: list(islice(source, chunk)), [])):
            yield from results
