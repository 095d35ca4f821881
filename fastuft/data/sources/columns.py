"""The columns of a table: its images and its classes."""

from __future__ import annotations

import json
from typing import Any

from fastuft.data.sources.blobs import BlobError


def features_of(schema: Any) -> dict[str, dict[str, Any]]:
    """The column descriptions that the ``datasets`` library stores; empty for files of other origin."""
    try:
        found = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: about for name, about in found.items() if isinstance(about, dict)}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}


def image_column(schema: Any) -> str:
    """The dotted name of the image column, of bytes or of structs with the field ``bytes``.

    Raises:
        BlobError: there is none, or there are several and not exactly one is declared as images.
    """
    from pyarrow import types

    leaves: dict[str, str] = {}
    for field in schema:
        inner = {part.name: part.type for part in field.type} if types.is_struct(field.type) else {}
        if _holds_bytes(field.type):
            leaves[field.name] = field.name
        elif "bytes" in inner and _holds_bytes(inner["bytes"]):
            leaves[field.name] = f"{field.name}.bytes"
    features = features_of(schema)
    declared = [name for name in leaves if features.get(name, {}).get("_type") == "Image"]
    found = declared or list(leaves)
    if len(found) != 1:
        which = ", ".join(found) or "none"
        raise BlobError(f"needs one column of image bytes and has {len(found)} ({which}); keep one")
    return leaves[found[0]]


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def label_column(schema: Any) -> str | None:
    """The column of classes: ``label``, or the only column declared as a class label; None if there is none."""
    if "label" in schema.names:
        return "label"
    declared = [name for name, about in features_of(schema).items() if about.get("_type") == "ClassLabel"]
    return declared[0] if len(declared) == 1 and declared[0] in schema.names else None


def class_texts(values: list[Any], column: str, features: dict[str, dict[str, Any]]) -> list[str]:
    """The classes of a label column as text: the names that ``datasets`` stores, or else the values."""
    said = features.get(column, {}).get("names")
    names = said if isinstance(said, list) else []
    return [str(names[value]) if isinstance(value, int) and 0 <= value < len(names) else str(value) for value in values]
