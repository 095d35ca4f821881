"""Warnings about the images of a run, printed before it starts."""

from __future__ import annotations

from fastuft.data import Manifest, find_duplicates

_FEW = 200  # images
_MANY_ALIKE = 0.02  # share of images that look like another one
_SECONDS = 10.0  # time limit of the search


def doubts_about(manifest: Manifest) -> list[str]:
    """One line for each property of the target that harms finetuning: few images, and duplicates."""
    target, lines = manifest.paths[: manifest.num_target], []
    if len(target) < _FEW:
        lines.append(
            f"{len(target)} target images are few: expect small gains and large differences between seeds. Images of the "
            "same kind without labels would help most."
        )
    found = find_duplicates(target, seconds=_SECONDS)
    if found.share >= _MANY_ALIKE:
        lines.append(
            f"{found.line()}. Training treats copies as different images: keep one of each "
            "(`fastuft verify-data` counts them in any folder)."
        )
    return lines
