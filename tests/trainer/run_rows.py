"""What a run wrote to metrics.jsonl."""

from __future__ import annotations

import json

_CLOCK = ("time", "images_per_second", "seconds_per_step", "data_wait_share", "seconds")


def rows(folder, kind="train"):
    """The rows of one kind, without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in _CLOCK} for row in found if row["kind"] == kind]
