"""Safetensors files that contain their own digest, so that a flipped bit is detected, which the format alone does not do."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

_KEY = "fastuft_digest"  # in the metadata
_BLANK = "0" * 64  # placeholder while the digest is computed
_PART = 1 << 24  # bytes read at once

UNSEALED = {_KEY: _BLANK}
"""Metadata that a file to be sealed is serialized with."""


def seal(content: bytes) -> bytes:
    """Replace the placeholder ``UNSEALED`` in the metadata of a serialized safetensors file with the digest of its bytes.

    Raises:
        ValueError: there is no placeholder.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    head, found, rest = content[:end].partition(_BLANK.encode())
    if not found:
        raise ValueError("the file has no placeholder for its digest; serialize it with UNSEALED in its metadata")
    return b"".join((head, hashlib.sha256(content).hexdigest().encode(), rest, content[end:]))


def damage(path: Path) -> str | None:
    """Why a safetensors file differs from what was written (its length or its digest is wrong), or None.

    A file without a digest is whole if its length is right.
    """
    try:
        if not path.is_file():
            raise OSError(errno.EINVAL, "not a regular file")
        with path.open("rb") as file:
            start = file.read(8)
            length, size = int.from_bytes(start, "little"), path.stat().st_size
            head = file.read(length) if length < size else b""
            expected = _expected(head, size - 8 - length)
            if expected is None:
                return f"{path} is truncated or altered ({size} bytes)"
            if not expected:
                return None
            digest = hashlib.sha256(start + head.replace(expected.encode(), _BLANK.encode(), 1))
            while part := file.read(_PART):
                digest.update(part)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if digest.hexdigest() == expected:
        return None
    return (
        f"{path} does not match the digest in it: it was altered. Where that was done on purpose, write it without "
        f"{_KEY} in its metadata"
    )


def _expected(head: bytes, data: int) -> str | None:
    """The digest in a header, "" if it has none; None if the header is damaged or does not describe ``data`` bytes."""
    try:
        header: Any = json.loads(head)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        digest = header.get("__metadata__", {}).get(_KEY, "")
        return digest if ends and max(ends) == data and isinstance(digest, str) else None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None
