"""The run folder belongs to one run at a time; the main rank holds it for all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from fastuft.runfolder import FolderInUseError, RunFolder, RunLock
from fastuft.trainer.distributed import Ranks


@contextmanager
def hold(folder: RunFolder, ranks: Ranks) -> Iterator[RunLock | None]:
    """Hold ``folder`` until the block ends; every rank takes part, and the main one gets the lock.

    Raises:
        FolderInUseError: another run works in the folder; raised on every rank.
        OSError: the folder cannot be created or written.
    """
    lock, failure = None, None
    with ExitStack() as stack:
        if ranks.is_main:
            try:
                lock = stack.enter_context(folder.lock())
            except (FolderInUseError, OSError) as error:
                failure = error
        reason = ranks.gather_objects(None if failure is None else str(failure))[0]
        if reason is not None:
            raise failure or FolderInUseError(reason)
        yield lock
