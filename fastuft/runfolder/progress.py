"""How far a run has come."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far a run has come; a checkpoint holds these numbers under the same names.

    Args:
        epoch: epochs done.
        step: steps done of the epoch that is under way.
        global_step: steps done in all.
        images: images trained on by all ranks, repetitions counted.
        seconds: time spent, the parts before each resume included.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    images: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """The progress that a checkpoint's state holds."""
        return cls(**{field.name: state[field.name] for field in dataclasses.fields(cls)})

    def after_step(self, images: int) -> Progress:
        """One step of the epoch further, which took ``images`` images."""
        return dataclasses.replace(
            self, step=self.step + 1, global_step=self.global_step + 1, images=self.images + images
        )

    def after_epoch(self) -> Progress:
        """At the start of the next epoch."""
        return dataclasses.replace(self, epoch=self.epoch + 1, step=0)

    def at(self, seconds: float) -> Progress:
        """The same after ``seconds`` in all."""
        return dataclasses.replace(self, seconds=seconds)

    def as_dict(self) -> dict[str, int | float]:
        """The numbers by name, as a checkpoint holds them."""
        return dataclasses.asdict(self)
