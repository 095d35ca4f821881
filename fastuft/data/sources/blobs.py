"""Single objects whose parts can be read: files, and objects behind a URL."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Protocol

from fastuft.names import printable


class BlobError(Exception):
    """Why an object, or a part of it, cannot be read; the text names no object and holds no credentials."""


class MissingBlobError(BlobError):
    """The object is not there."""


class ChangedBlobError(BlobError):
    """The object is another one than when it was looked at."""


class Blob(Protocol):
    """An object as it was when it was looked at."""

    @property
    def shown(self) -> str:
        """Where it is, without credentials."""

    @property
    def name(self) -> str:
        """Its name, relative to what was asked for."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def tag(self) -> str:
        """Changes with the content: an etag, or the time of the last change."""

    @property
    def remote(self) -> bool:
        """Whether reading waits for a network."""

    def read(self, offset: int, length: int, part: str = "") -> bytes:
        """``length`` bytes from ``offset`` on; ``part`` is what messages call them.

        Raises:
            BlobError: they cannot be read, are not all there, or belong to another object by now.
        """


@dataclass(frozen=True)
class LocalBlob:
    """A file as it was when it was looked at; see :class:`Blob`."""

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
            BlobError: it is not there, or is not a regular file.
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
                    raise ChangedBlobError("has changed since it was looked at; start again with what is there now")
                parts = []
                while length > 0 and (piece := os.pread(file, length, offset)):
                    parts.append(piece)
                    offset, length = offset + len(piece), length - len(piece)
            finally:
                os.close(file)
        except FileNotFoundError as error:
            raise MissingBlobError("does not exist any more") from error
        except OSError as error:
            raise BlobError(f"cannot be read ({error.strerror or error})") from error
        if length:
            raise BlobError(f"ends at byte {offset}, {length} bytes too early")
        return parts[0] if len(parts) == 1 else b"".join(parts)


def say_bad(bad: list[tuple[str, str]], total: int, what: str) -> ValueError:
    """The error that names objects which cannot be used, and why.

    Args:
        bad: (where, why) of them.
        total: objects in all.
        what: they are, as a plural.
    """
    named = "; ".join(f"{printable(where)} {why}" for where, why in bad[:6])
    more = f"; and {len(bad) - 6} more" if len(bad) > 6 else ""
    return ValueError(
        f"{len(bad)} of {total} {what} cannot be used: {named}{more}. Copy them again, or name the others only"
    )
