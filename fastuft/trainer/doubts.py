"""What the images of a run let one expect, said before it begins."""

from __future__ import annotations

from fastuft.data import Manifest, find_duplicates

_FEW = 200  # images
_MANY_ALIKE = 0.02  # share of images that look like another one
_SECONDS = 10.0  # that looking for them may take


def doubts_about(manifest: Manifest) -> list[str]:
    """A line for each property of the target that finetuning suffers from: few images, and images that repeat."""
    target, lines = manifest.paths[: manifest.num_target], []
    if len(target) < _FEW:
        lines.append(
            f"{len(target)} target images are few: expect small gains and large differences between seeds. Images of the "
            "same kind without labels would help most."
        )
    found = find_duplicates(target, seconds=_SECONDS)
    if found.share >= _MANY_ALIKE:
        lines.append(
            f"{found.line()}. Each is taken for the opposite of its copies: keep one of them "
            "(`fastuft verify-data` tells the same of any folder)."
        )
    return lines
