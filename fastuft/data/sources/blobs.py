"""Objects that can be read in parts: local files, and objects behind URLs."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Protocol

from fastuft.names import printable


class BlobError(Exception):
    """An object, or a part of it, cannot be read. The text holds the reason, without the object's name or credentials."""


class MissingBlobError(BlobError):
    """The object does not exist."""


class ChangedBlobError(BlobError):
    """The object has changed since it was listed."""


class Blob(Protocol):
    """An object as it was when it was listed."""

    @property
    def shown(self) -> str:
        """Its path or URL, without credentials."""

    @property
    def name(self) -> str:
        """Its name, relative to the location that was listed."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    @property
    def tag(self) -> str:
        """A text that changes with the content: an etag or a modification time."""

    @property
    def remote(self) -> bool:
        """Whether reading goes over a network."""

    def read(self, offset: int, length: int, part: str = "") -> bytes:
        """``length`` bytes starting at ``offset``; messages name them by ``part``.

        Raises:
            BlobError: they cannot be read, the object is too short, or it has changed.
        """


@dataclass(frozen=True)
class LocalBlob:
    """A file as it was when it was listed; see :class:`Blob`."""

    path: str
    name: str
    size: int
    tag: str
    remote = False

    @property
    def shown(self) -> str:
        """See :class:`Blob`."""
        return self.path

    @classmethod
    def look(cls, path: str, name: str = "") -> LocalBlob:
        """The file at an absolute path.

        Raises:
            BlobError: it does not exist, or is not a regular file.
        """
        try:
            found = os.stat(path)
        except FileNotFoundError as error:
            raise MissingBlobError("does not exist") from error
        except OSError as error:
            raise BlobError(f"cannot be read ({error.strerror or error})") from error
        if not stat.S_ISREG(found.st_mode):
            raise BlobError("is not a regular file")
        return cls(path, name or os.path.basename(path), found.st_size, str(found.st_mtime_ns))

    def read(self, offset: int, length: int, part: str = "") -> bytes:
        """See :class:`Blob`."""
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                found = os.fstat(file)
                if (found.st_size, str(found.st_mtime_ns)) != (self.size, self.tag):
                    raise ChangedBlobError("has changed since it was listed; start again to use its current content")
                parts = []
                while length > 0 and (piece := os.pread(file, length, offset)):
                    parts.append(piece)
                    offset, length = offset + len(piece), length - len(piece)
            finally:
                os.close(file)
        except FileNotFoundError as error:
            raise MissingBlobError("no longer exists") from error
        except OSError as error:
            raise BlobError(f"cannot be read ({error.strerror or error})") from error
        if length:
            raise BlobError(f"ends at byte {offset}, {length} bytes short")
        return parts[0] if len(parts) == 1 else b"".join(parts)


def say_bad(bad: list[tuple[str, str]], total: int, what: str) -> ValueError:
    """The error that names unusable objects and their reasons.

    Args:
        bad: (location, reason) of each.
        total: number of all objects.
        what: what the objects are, in the plural.
    """
    named = "; ".join(f"{printable(where)} {why}" for where, why in bad[:6])
    more = f"; and {len(bad) - 6} more" if len(bad) > 6 else ""
    return ValueError(f"{len(bad)} of {total} {what} cannot be used: {named}{more}. Copy them again, or leave them out")
