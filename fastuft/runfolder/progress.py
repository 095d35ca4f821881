"""The progress of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """The progress of a run; a checkpoint has these numbers under the same names.

    Args:
        epoch: completed epochs.
        step: completed steps of the current epoch.
        global_step: completed steps in total.
        images: images that all ranks trained on, counting repetitions.
        seconds: time spent, including the time before each resume.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    images: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """The progress in a checkpoint's state."""
        return cls(**{field.name: state[field.name] for field in dataclasses.fields(cls)})

    def after_step(self, images: int) -> Progress:
        """The progress after one more step, on ``images`` images."""
        return dataclasses.replace(
            self, step=self.step + 1, global_step=self.global_step + 1, images=self.images + images
        )

    def after_epoch(self) -> Progress:
        """The progress at the start of the next epoch."""
        return dataclasses.replace(self, epoch=self.epoch + 1, step=0)

    def at(self, seconds: float) -> Progress:
        """The same progress after ``seconds`` in total."""
        return dataclasses.replace(self, seconds=seconds)

    def as_dict(self) -> dict[str, int | float]:
        """The numbers by name, as in a checkpoint."""
        return dataclasses.asdict(self)
