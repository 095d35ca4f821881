"""Images that look the same: copies, other sizes, other compression, frames of a burst.

Each image is hashed to 128 bits: whether brightness rises by more than ``_STEP`` from one pixel to the next, to the right and
down, in a thumbnail of 9 x 9 (a difference hash). Two images count as the same if at most ``DISTANCE`` bits differ. On
photographs, JPEG at quality 60 changes 1 bit at the median and more than 2 bits in one of ten images; scaling to 0.7 of the
size changes 2 and 5. Of 900 photographs of 30 kinds, at most 6 come this close to another one. Images below ``_SMALL`` px have
too little detail for this (a 1 looks like any other 1) and count as the same only if all pixels are equal. Memory is 20 bytes
per image. Pairs are found by sorting eight bands of 16 bits, of which at least one is equal if so few bits differ.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastuft.data.bad import BadImageError
from fastuft.data.decoding import decode_rgb, read_image
from fastuft.data.reading import READERS, in_threads
from fastuft.names import printable

DISTANCE = 5  # bits of 128
_SIDE = 8
_SMALL = 64
_STEP = 2  # of 255: less is noise
_BANDS = 8
_AT_ONCE = 256  # images between checks of the time
_Bits = NDArray[np.uint8]


@dataclass(frozen=True)
class Duplicates:
    """Which of some images look like others.

    Args:
        checked: number of images that were compared; bad files do not count.
        total: number of all images.
        repeated: number of compared images that look like an earlier one.
        pair: an example of two such images; empty if there are none.
    """

    checked: int
    total: int
    repeated: int
    pair: tuple[str, str] | tuple[()] = ()

    @property
    def share(self) -> float:
        """Share of the checked images that repeat another."""
        return self.repeated / self.checked if self.checked else 0.0

    def line(self) -> str:
        """One line for the user; empty if nothing repeats."""
        if not self.pair:
            return ""
        first, second = map(printable, self.pair)
        of = f"{self.checked:,}" if self.checked == self.total else f"{self.checked:,} checked"
        return f"{self.repeated:,} of {of} images look like another one (first: {first} and {second})"


def find_duplicates(
    paths: Sequence[str],
    *,
    known: Sequence[str] = (),
    seconds: float = float("inf"),
    progress: Callable[[int], object] | None = None,
) -> Duplicates:
    """Images of ``paths`` that look like an earlier one of them; with ``known``, like one of those instead.

    Args:
        paths: the images.
        known: other images, such as those of training where ``paths`` are those of a test.
        seconds: time in seconds after which no more images are compared; half of it is for ``known``.
        progress: called with the number of images compared since the last call.
    """
    known_bits, known_files = _hashes(known, time.monotonic() + seconds / 2, progress)
    own_bits, own_files = _hashes(paths, time.monotonic() + seconds / 2, progress)
    bits, others = np.concatenate([known_bits, own_bits]), len(known_files)  # known images come first
    files = [*known_files, *(len(known) + file for file in own_files)]
    first = _firsts(len(files), _similar(bits))  # the first image that looks like each row
    repeated = [row for row in range(others, len(files)) if first[row] < (others if known else row)]
    every = [*known, *paths]
    pair = (every[files[first[repeated[0]]]], every[files[repeated[0]]]) if repeated else ()
    return Duplicates(len(files) - others, len(paths), len(repeated), pair)


def _hash(path: str) -> _Bits | None:
    """Bits [16] of an image, packed; None for one that cannot be read."""
    try:
        image = read_image(path)
        if image.header.format == "JPEG" and image.header.orientation == 1:
            with Image.open(io.BytesIO(image.data)) as opened:  # decoded at a fraction of its size
                opened.draft("L", (16 * _SIDE, 16 * _SIDE))
                gray = opened.convert("L")
        else:
            gray = decode_rgb(image).convert("L")
        if min(gray.size) < _SMALL:
            return np.frombuffer(hashlib.blake2b(gray.tobytes(), digest_size=2 * _SIDE).digest(), np.uint8)
        thumbnail = gray.resize((_SIDE + 1, _SIDE + 1), Image.Resampling.BOX)
    except BadImageError:
        return None
    except Exception:
        return None
    pixels = np.asarray(thumbnail, np.int16)
    right, down = pixels[:-1, 1:] - pixels[:-1, :-1], pixels[1:, :-1] - pixels[:-1, :-1]
    return np.packbits([right > _STEP, down > _STEP])


def _hashes(
    paths: Sequence[str], end: float, progress: Callable[[int], object] | None
) -> tuple[NDArray[np.uint8], list[int]]:
    """Bits [N, 16] and the positions of their images."""
    rows: list[_Bits] = []
    files: list[int] = []
    for start in range(0, len(paths), _AT_ONCE):
        part = paths[start : start + _AT_ONCE]
        for number, bits in enumerate(in_threads(_hash, part, READERS), start):
            if bits is not None:
                rows.append(bits)
                files.append(number)
        if progress is not None:
            progress(len(part))
        if time.monotonic() > end:
            break
    return (np.stack(rows) if rows else np.empty((0, 2 * _SIDE), np.uint8)), files


def _firsts(count: int, pairs: set[tuple[int, int]]) -> list[int]:
    """The first row of the group that each row belongs to, over pairs of rows of one group."""
    first = list(range(count))

    def of(row: int) -> int:
        while first[row] != row:
            first[row] = first[first[row]]
            row = first[row]
        return row

    for low, high in pairs:
        one, other = sorted((of(low), of(high)))
        first[other] = one
    return [of(row) for row in range(count)]


def _similar(bits: NDArray[np.uint8]) -> set[tuple[int, int]]:
    """Pairs (earlier, later) of rows that differ in few bits, enough to find nearly every group.

    Among rows with an equal band, each is compared with the first and with the previous one, in the order of all bits.
    """
    pairs: set[tuple[int, int]] = set()
    if len(bits) < 2:
        return pairs
    whole = np.ascontiguousarray(bits).view(np.uint64)  # [N, 2]; any order that puts equal rows together
    for band in np.split(bits, _BANDS, axis=1):
        key = np.ascontiguousarray(band).view(np.uint16).ravel()
        order = np.lexsort((*whole.T, key))
        same = key[order][1:] == key[order][:-1]
        first = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(len(order)), 0))
        for partner in (order[:-1][same], order[first[1:]][same]):
            own = order[1:][same]
            differing = np.unpackbits(bits[own] ^ bits[partner], axis=1).sum(1)
            near = (differing <= DISTANCE) & (own != partner)
            low, high = np.minimum(own, partner)[near], np.maximum(own, partner)[near]
            pairs.update(zip(low.tolist(), high.tolist(), strict=True))
    return pairs
