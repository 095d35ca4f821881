"""Which files are images by name, and how the other files are reported."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastuft.messages import note
from fastuft.names import printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_NAMED = 6  # number of suffixes that the report names
_JUNK = frozenset(
    {
        "__macosx",
        "@eadir",
        "lost+found",
        "$recycle.bin",
        "system volume information",
        ".ipynb_checkpoints",
        ".thumbnails",
        "thumbnails",
    }
)

IsImage = Callable[[str], bool]


def checked_suffixes(suffixes: Sequence[str]) -> tuple[str, ...]:
    """The suffixes in lower case.

    Raises:
        ValueError: a suffix does not begin with a dot.
    """
    for suffix in suffixes:
        if suffix and (not suffix.startswith(".") or os.sep in suffix):
            raise ValueError(f"suffix {suffix!r} is not allowed; suffixes begin with a dot, as in .tif")
    return tuple(suffix.lower() for suffix in suffixes)


def image_names(suffixes: tuple[str, ...]) -> IsImage:
    """A function that tells whether a name has one of the suffixes."""
    return lambda name: os.path.splitext(name)[1].lower() in suffixes


def is_junk(folder: str) -> bool:
    """Whether a folder of this name is one that operating systems or programs leave behind."""
    return folder.lower() in _JUNK


@dataclass
class LeftOut:
    """Counts of the files and folders at a location that are not images.

    Args:
        others: number of other files by suffix.
        junk: number of skipped system folders by name.
    """

    others: Counter[str] = field(default_factory=Counter)
    junk: Counter[str] = field(default_factory=Counter)
    _known: set[str] = field(default_factory=set, repr=False)  # system folders that were counted

    def add(self, other: LeftOut) -> None:
        """Add the counts of ``other``."""
        self.others += other.others
        self.junk += other.junk

    def takes(self, name: str, is_image: IsImage) -> bool:
        """Whether a name, with its folders, is an image; other names are counted, and hidden ones are not."""
        *folders, last = name.split("/")
        for depth, folder in enumerate(folders, 1):
            if is_junk(folder):
                path = "/".join(folders[:depth])
                self.junk[folder] += path not in self._known
                self._known.add(path)
                return False
        if any(part.startswith(".") for part in (*folders, last)):
            return False
        if is_image(last):
            return True
        self.others[os.path.splitext(last)[1].lower()] += 1
        return False

    def report(self, location: str, images: int) -> None:
        """Print one line if anything was left out."""
        parts = []
        if self.others:
            counts = sorted(self.others.items(), key=lambda item: (-item[1], item[0] or "~"))[:_NAMED]
            named = [f"{number} {printable(suffix) or 'without a suffix'}" for suffix, number in counts]
            more = ", and others" if len(self.others) > _NAMED else ""
            parts.append(f"{self.others.total()} other files ({', '.join(named)}{more})")
        parts += [f"{number} x the folder {name}" for name, number in sorted(self.junk.items())]
        if parts:
            hint = "; add other suffixes of images to data.suffixes" if self.others else ""
            note(f"'{printable(location)}': {images} images; left out: {', '.join(parts)}{hint}")
