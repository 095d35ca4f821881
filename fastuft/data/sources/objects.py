"""Images that are single objects behind URLs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fastuft.data.bad import BadImageError
from fastuft.data.images import ImageSource, Located, Rows
from fastuft.data.reading import LARGEST
from fastuft.data.sources.blobs import Blob, BlobError


class Objects(ImageSource):
    """One image per object.

    Args:
        blobs: the objects, in order.
    """

    remote = True

    def __init__(self, blobs: Sequence[Blob]) -> None:
        self.blobs = blobs

    def __len__(self) -> int:
        return len(self.blobs)

    def path(self, row: int) -> str:
        """See :class:`fastuft.data.images.ImageSource`."""
        return Located(self.blobs[row].shown, self, row)

    def name(self, row: int) -> str:
        """See :class:`fastuft.data.images.ImageSource`."""
        return self.blobs[row].name

    def sizes(self, rows: Rows) -> Rows:
        """See :class:`fastuft.data.images.ImageSource`."""
        return np.fromiter((self.blobs[row].size for row in rows.tolist()), np.int64, len(rows))

    def read(self, row: int) -> bytes:
        """See :class:`fastuft.data.images.ImageSource`."""
        blob = self.blobs[row]
        if not 0 < blob.size <= LARGEST:
            raise BadImageError(
                self.path(row), f"has {blob.size} bytes, more than {LARGEST}" if blob.size else "is empty"
            )
        try:
            return blob.read(0, blob.size)
        except BlobError as error:
            raise BadImageError(self.path(row), f"cannot be read ({error})") from error

    def version(self, row: int) -> int:
        """See :class:`fastuft.data.images.ImageSource`."""
        digest = hashlib.blake2b(self.blobs[row].tag.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    def containers(self) -> frozenset[str]:
        """See :class:`fastuft.data.images.ImageSource`: each object contains only itself."""
        return frozenset(blob.shown for blob in self.blobs)
