"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write beside, flush to the disk, then rename: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the disk refused (full, gone); the old file is as it was and nothing is left beside it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name is on the disk too
        finally:
            os.close(folder)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
