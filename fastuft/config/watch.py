"""Options of evaluation during training: ``watch.*``, which needs labels, and ``verdict.*``, which needs none."""

from __future__ import annotations

from dataclasses import dataclass

from fastuft.config.checks import AtLeast0, AtLeast1, check_values


@dataclass(frozen=True)
class WatchConfig:
    """Optional evaluation during training.

    Args:
        train: labeled folder whose images are the gallery of retrieval.
        test: labeled folder whose images are the queries.
        source: labeled source folder whose clustering accuracy is measured (forgetting).
        every_epochs: epochs between evaluations; 0 is off.
    """

    train: str | None = None
    test: str | None = None
    source: str | None = None
    every_epochs: AtLeast0 = 0

    def __post_init__(self) -> None:
        check_values(self, "watch")
        if self.every_epochs and not (self.source or (self.train and self.test)):
            raise ValueError(
                f"watch.every_epochs={self.every_epochs} needs something to watch; "
                "set watch.train and watch.test, or watch.source"
            )


@dataclass(frozen=True)
class VerdictConfig:
    """Looks at the features during finetuning, and the verdict without labels.

    Args:
        looks: looks during the run, besides the one at its start; 0 turns the verdict off.
        images: images in the fixed sample, from the target and from the source each.
    """

    looks: AtLeast0 = 5
    images: AtLeast1 = 256

    def __post_init__(self) -> None:
        check_values(self, "verdict")
