"""The folder of caches."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """``fastuft`` in the user's cache folder; None if the user has no home folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "fastuft" if os.path.isabs(home) else None
