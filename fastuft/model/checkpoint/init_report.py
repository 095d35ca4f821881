"""What became of a checkpoint's tensors when it was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastuft.model.checkpoint.conversion import Channels


@dataclass(frozen=True)
class InitReport:
    """The report on a checkpoint's tensors.

    Args:
        path: the file.
        layout: layout and prefix under which the backbone was found.
        matched: backbone tensors that were loaded.
        missing: backbone tensors that the file lacks (allowed by pattern, or BatchNorm's counters).
        ignored: tensors in the file that were not used.
        head_loaded: whether the projection head came from the file too; None if there is no head.
        others: prefixes of other whole backbones in the file.
        traits: traits that the network adopted, as plain values.
        channels: channels that the file's first convolution expects.
    """

    path: str
    layout: str
    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    head_loaded: bool | None = None
    others: tuple[str, ...] = ()
    traits: Mapping[str, Any] = field(default_factory=dict)
    channels: Channels = "rgb"

    def __str__(self) -> str:
        head = "" if self.head_loaded is None else ", head loaded" if self.head_loaded else ", fresh head"
        others = f"; --init_key can choose {', '.join(self.others)}" if self.others else ""
        return (
            f"{self.path}: {self.layout}; {len(self.matched)} tensors matched, {len(self.missing)} missing, "
            f"{len(self.ignored)} ignored{head}{others}"
        )
