"""Objects behind URLs (s3, gs, http, https), listed and read in parts by obstore, which also finds the credentials."""

from __future__ import annotations

import base64
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import unquote

from fastuft.data.sources.blobs import BlobError, ChangedBlobError, MissingBlobError
from fastuft.messages import note
from fastuft.names import printable

SCHEMES = ("s3", "gs", "http", "https")
_TRIES = 8
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0  # seconds before the next attempt; doubles each time, with jitter
_GIVE_UP = 45.0  # seconds after which no further attempt is made; below data.read_timeout
_ANSWER = 20.0  # timeout of one request, seconds
_SHOWN_FAILURES = 20
_AGAIN = frozenset({"408", "425", "429"})  # statuses worth another attempt, besides 5xx

Result = TypeVar("Result")
_failures = 0
_lock = threading.Lock()


@dataclass(frozen=True)
class Address:
    """The parts of a URL.

    Args:
        scheme: one of ``SCHEMES``.
        host: the bucket, or the server with its port.
        key: the object's key, percent-decoded for http(s).
        login: ``user:password``, or empty.
        query: query string of http(s), where signatures are.
    """

    scheme: str
    host: str
    key: str
    login: str = ""
    query: str = ""

    @classmethod
    def of(cls, text: str) -> Address:
        """Split a URL.

        Raises:
            ValueError: the scheme is not supported, or there is no host.
        """
        scheme, _, rest = text.partition("://")
        scheme = scheme.lower()
        login, _, host = rest.partition("/")[0].rpartition("@")
        key, query = rest.partition("/")[2], ""
        if scheme.startswith("http"):
            key, _, query = key.partition("?")
            key = unquote(key)
        if scheme not in SCHEMES or not host:
            shown = f"{scheme}://{host}/{key}"
            raise ValueError(
                f"'{printable(shown)}' is not supported; allowed: file, {', '.join(SCHEMES)}, as in s3://BUCKET/KEY"
            )
        return cls(scheme, host, key, login, query)

    @property
    def shown(self) -> str:
        """The URL without credentials."""
        return f"{self.scheme}://{self.host}/{self.key}"


class Bucket:
    """One bucket or server.

    Args:
        address: the address of any object in it.
    """

    def __init__(self, address: Address) -> None:
        try:
            import obstore
            from obstore.store import from_url
        except ImportError as error:
            raise ValueError(f"{address.shown}: URLs need obstore; pip install 'fastuft[remote]'") from error
        self._obstore: Any = obstore
        self.shown = f"{address.scheme}://{address.host}"
        self.lists = not address.scheme.startswith("http")
        client: dict[str, Any] = {
            "timeout": timedelta(seconds=_ANSWER),
            "connect_timeout": timedelta(seconds=_ANSWER / 2),
        }
        url = self.shown
        # obstore ignores this variable once other client options are set.
        if address.scheme == "http" or os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("true", "1"):
            client["allow_http"] = True
        if address.login:
            coded = base64.b64encode(unquote(address.login).encode()).decode()
            client["default_headers"] = {"Authorization": f"Basic {coded}"}
        if address.query:
            url += f"/?{address.query}"
        try:
            open_store: Any = from_url  # overloaded per store
            # Retries are made here, where they are reported.
            self._store = open_store(url, client_options=client, retry_config={"max_retries": 0})
        except Exception as error:
            raise ValueError(f"{self.shown} cannot be opened ({_reason(error)[0]})") from None

    def look(self, key: str, name: str) -> RemoteBlob:
        """The object as it currently is.

        Raises:
            BlobError: it does not exist, or cannot be read.
        """
        meta = patiently(lambda: self._obstore.head(self._store, key), f"{self.shown}/{key}")
        return RemoteBlob(self, key, name, int(meta["size"]), _tag(meta))

    def list(self, prefix: str) -> Iterator[RemoteBlob]:
        """The objects below a prefix, sorted by key, with names relative to it."""

        def pages() -> list[Any]:
            return [meta for page in self._obstore.list(self._store, prefix or None, chunk_size=1000) for meta in page]

        skip = len(prefix) + 1 if prefix else 0
        for meta in sorted(patiently(pages, f"{self.shown}/{prefix}"), key=lambda meta: str(meta["path"])):
            yield RemoteBlob(self, meta["path"], meta["path"][skip:], int(meta["size"]), _tag(meta))

    def read(self, blob: RemoteBlob, offset: int, length: int, part: str) -> bytes:
        """A part of an object; see :meth:`fastuft.data.sources.blobs.Blob.read`."""
        options: dict[str, Any] = {"range": (offset, offset + length)}
        if blob.tag.startswith('"'):  # weak etags and modification times are compared below
            options["if_match"] = blob.tag

        def get() -> bytes:
            found = self._obstore.get(self._store, blob.key, options=options)
            if int(found.meta["size"]) != blob.size or (blob.tag and _tag(found.meta) not in ("", blob.tag)):
                raise ChangedBlobError("has changed since it was listed; start again to use its current content")
            return bytes(found.bytes())

        content = patiently(get, f"{blob.shown}/{part}" if part else blob.shown)
        if len(content) != length:
            raise BlobError(f"ends at byte {offset + len(content)}, {length - len(content)} bytes short")
        return content


@dataclass(frozen=True, slots=True)
class RemoteBlob:
    """An object as it was when it was listed; see :class:`fastuft.data.sources.blobs.Blob`."""

    bucket: Bucket
    key: str
    name: str
    size: int
    tag: str

    @property
    def remote(self) -> bool:
        """See :class:`fastuft.data.sources.blobs.Blob`."""
        return True

    @property
    def shown(self) -> str:
        """See :class:`fastuft.data.sources.blobs.Blob`."""
        return f"{self.bucket.shown}/{self.key}"

    def read(self, offset: int, length: int, part: str = "") -> bytes:
        """See :class:`fastuft.data.sources.blobs.Blob`."""
        return self.bucket.read(self, offset, length, part)


@lru_cache(maxsize=64)
def _bucket(scheme: str, host: str, login: str, query: str) -> Bucket:
    return Bucket(Address(scheme, host, "", login, query))


def bucket_of(address: Address) -> Bucket:
    """The bucket or server of an address, shared by all addresses with the same credentials."""
    return _bucket(address.scheme, address.host, address.login, address.query)


def patiently(ask: Callable[[], Result], shown: str) -> Result:
    """The result of ``ask``; transient failures are retried, and each is reported in one line.

    Raises:
        BlobError: the failure is permanent, or it persisted.
    """
    began = time.monotonic()
    for attempt in range(_TRIES):
        try:
            return ask()
        except BlobError:
            raise
        except Exception as error:
            reason, transient = _reason(error)
            wait = random.uniform(0.5, 1.0) * min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt)
            if not transient or attempt + 1 == _TRIES or time.monotonic() + wait - began > _GIVE_UP:
                times = f", {attempt + 1} times" if attempt else ""
                kind = {FileNotFoundError: MissingBlobError, "changed": ChangedBlobError}
                named = type(error) if isinstance(error, FileNotFoundError) else reason.split(" ")[1]
                raise kind.get(named, BlobError)(reason + times) from None  # the original may hold credentials
            if attempt == 0:
                _say_failure(shown, reason)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _reason(error: Exception) -> tuple[str, bool]:
    """(reason, without any URL; whether the failure may be transient)."""
    kind, text = type(error).__name__, str(error)
    status = re.search(r"status code: (\d{3})[ A-Za-z-]*", text)
    said = f" ({status[0].removeprefix('status code: ').strip()})" if status else ""
    if isinstance(error, FileNotFoundError):
        return "does not exist", False
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or (
        status is not None and status[1] in ("401", "403")
    ):
        return f"is refused{said}: check the credentials in the environment", False
    if kind in ("PreconditionError", "NotModifiedError"):
        return "has changed since it was listed; start again to use its current content", False
    if kind == "NotSupportedError":
        return "cannot be read in parts: the server ignores ranges", False
    if status is not None and status[1][0] != "5" and status[1] not in _AGAIN:
        return f"is refused{said}", False
    if "169.254." in text or "credential" in text.lower():
        return "needs credentials, but the environment has none", False
    if kind != "GenericError":
        return f"cannot be read ({kind})", False
    if status is not None:
        return f"was not served{said}", True
    late = "Timeout" in text or "TimedOut" in text or "timed out" in text
    return ("was not served in time" if late else "was not served: the connection failed"), True


def _say_failure(shown: str, reason: str) -> None:
    global _failures
    with _lock:
        _failures += 1
        number = _failures
    if number <= _SHOWN_FAILURES:
        note(f"{printable(shown)} {reason}; trying again")
    if number == _SHOWN_FAILURES:
        note("further transient failures are not shown")


def _tag(meta: Any) -> str:
    """The etag, or else the modification time; empty if the server gives neither."""
    if meta.get("e_tag"):
        return str(meta["e_tag"])
    changed = meta["last_modified"]
    return changed.isoformat() if changed.timestamp() > 0 else ""
