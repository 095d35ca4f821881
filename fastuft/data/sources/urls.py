"""The objects that a URL names: one, several through braces or a pattern, or all below a prefix."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from fastuft.data.reading import in_threads
from fastuft.data.sources.blobs import Blob, BlobError, say_bad
from fastuft.data.sources.braces import expand_braces, has_pattern, pattern
from fastuft.data.sources.remote import Address, RemoteBlob, bucket_of

_LOOKERS = 32  # concurrent requests for sizes and etags

Listing = list[tuple[str, str, int, str]]  # key, name, size and tag of each object
Agree = Callable[[Callable[[], Listing]], Listing]

_agree: ContextVar[Agree] = ContextVar("agree", default=lambda make: make())


@contextmanager
def listings_agreed(agree: Agree) -> Iterator[None]:
    """Within it, what a URL names is what ``agree`` returns.

    The processes of one run can thus share what one of them has listed. This saves requests, and all of them see the same
    objects even if some are added meanwhile.

    Args:
        agree: takes the function that makes a listing, and returns the listing that counts.
    """
    token = _agree.set(agree)
    try:
        yield
    finally:
        _agree.reset(token)


def shown_url(text: str) -> str:
    """A URL as messages show it, without login and query."""
    return Address.of(text).shown


def blobs_of(text: str, endings: tuple[str, ...]) -> list[Blob]:
    """The objects of a URL.

    Args:
        text: the URL, with braces or a pattern.
        endings: suffixes of single objects; any other URL is a prefix, whose objects are listed.

    Raises:
        ValueError: an object is missing or cannot be read, or the URL would need a listing from a web server.
    """
    whole = Address.of(text)
    addresses = [replace(whole, key=key) for key in dict.fromkeys(expand_braces(whole.key))]

    def make() -> Listing:
        return [(blob.key, blob.name, blob.size, blob.tag) for blob in _found(addresses, endings)]

    listing = _agree.get()(make)
    bucket = bucket_of(whole)
    return [RemoteBlob(bucket, *each) for each in listing]


def _found(addresses: list[Address], endings: tuple[str, ...]) -> list[RemoteBlob]:
    """What is at the addresses now."""
    found: list[RemoteBlob] = []
    single = []
    for address in addresses:
        listed = address.key.endswith("/") or not address.key.lower().endswith(endings)
        if has_pattern(address.key) or listed:
            found += _listed(address)
        else:
            single.append(address)
    base = os.path.commonpath([os.path.dirname(address.key) for address in single]) if single else ""

    def look(address: Address) -> RemoteBlob | BlobError:
        try:
            return bucket_of(address).look(address.key, os.path.relpath("/" + address.key, "/" + base))
        except BlobError as error:
            return error

    bad: list[tuple[str, str]] = []
    for address, blob in zip(single, in_threads(look, single, _LOOKERS, chunk=1), strict=True):
        if isinstance(blob, BlobError):
            bad.append((address.shown, str(blob)))
        else:
            found.append(blob)
    if bad:
        raise say_bad(bad, len(single), "objects")
    return found


def _listed(address: Address) -> list[RemoteBlob]:
    bucket = bucket_of(address)
    if not bucket.lists:
        raise ValueError(
            f"'{address.shown}': web servers cannot be listed; name objects, several with braces as in "
            "https://HOST/train-{000..146}.tar"
        )
    if not has_pattern(address.key):
        prefix, wanted = address.key.strip("/"), None
    else:
        fixed = address.key[: min(address.key.index(sign) for sign in "*?[" if sign in address.key)]
        prefix, wanted = fixed.rpartition("/")[0], pattern(address.key)
    try:
        return [blob for blob in bucket.list(prefix) if wanted is None or wanted.fullmatch(blob.key)]
    except BlobError as error:
        raise ValueError(f"'{address.shown}' {error}") from error
