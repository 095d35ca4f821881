"""Nested mappings, as they are read from JSON and YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def lookup(tree: object, *keys: str) -> Any:
    """The value under these keys, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything that is not a mapping."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
