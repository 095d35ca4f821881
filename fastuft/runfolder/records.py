"""JSON files, and files with one JSON object per line."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastuft.atomic import write_whole


def read_file(path: Path) -> bytes:
    """The content of a regular file; a pipe or device is refused instead of blocking.

    Raises:
        OSError: missing, unreadable, or of another kind.
    """
    if not path.is_file() and path.exists():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write one object, whole or not at all.

    Raises:
        OSError: the file could not be written; an older file is unchanged.
    """
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read one object.

    Raises:
        ValueError: not JSON, or not an object.
        OSError: missing or unreadable.
    """
    try:
        value = json.loads(read_file(path).decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise ValueError(f"{path} is not JSON ({error}); repeat the step that writes it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object; repeat the step that writes it")
    return value


def json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, complaints): the objects of a JSON-lines file, and what is wrong with its other lines.

    A last line that a crash truncated is left out silently.

    Raises:
        OSError: missing or unreadable.
    """
    rows: list[dict[str, Any]] = []
    complaints: list[str] = []
    lines = read_file(path).decode(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                reason = getattr(error, "msg", str(error))
                complaints.append(f"{path}:{number} is not JSON ({reason}); repair or remove that line")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            complaints.append(f"{path}:{number} is not a JSON object; each line holds one row of named values")
    return rows, complaints


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line that a crash truncated is left out.

    Raises:
        ValueError: any other line that is not an object.
        OSError: missing or unreadable.
    """
    rows, complaints = json_lines(path)
    if complaints:
        raise ValueError(complaints[0])
    return rows
