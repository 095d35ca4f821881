"""The layout of a grid's output folder::

runs/<backbone>/                   a run folder each
runs/<backbone>/eval-<data set>/   its evaluation
datasets/, source/, features/      class folders of the data sets, the drawn source share, cached features
data/                              the data sets as published, where a scale makes its own
locks/                             which process works on what
results.jsonl, comparison.*        every trial's figure, and the tables beside the paper's
figure1.html                       the maps of Figure 1
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastuft.config import EvalConfig, TrainConfig, WeightsConfig
from fastuft.reproduce.grid import PRETRAINED, Backbone, Measurement
from fastuft.runfolder import RunFolder


@dataclass(frozen=True)
class GridFolders:
    """Where everything of a grid lies, and what of it is finished.

    Args:
        out: the output folder.
        weights: checkpoints named for pretrained backbones, which are then not trained.
    """

    out: Path
    weights: WeightsConfig

    @property
    def data(self) -> Path:
        """Data sets as published, where a scale makes its own."""
        return self.out / "data"

    @property
    def datasets(self) -> Path:
        """Class folders of the data sets."""
        return self.out / "datasets"

    @property
    def features(self) -> Path:
        """Cached features."""
        return self.out / "features"

    @property
    def results(self) -> Path:
        """Every trial's figure."""
        return self.out / "results.jsonl"

    @property
    def comparison(self) -> Path:
        """The tables beside the paper's, as text."""
        return self.out / "comparison.txt"

    @property
    def figure(self) -> Path:
        """The maps of Figure 1."""
        return self.out / "figure1.html"

    def source(self, share: str) -> Path:
        """Images that were taken from the source's tar shards."""
        return self.out / "source" / share

    def run(self, backbone: Backbone) -> Path:
        """A backbone's run folder."""
        return self.out / "runs" / backbone.name

    def summary(self, backbone: Backbone) -> Path:
        """What a training says of itself when it ends."""
        return RunFolder(self.run(backbone)).summary_file

    def evaluation(self, measurement: Measurement) -> Path:
        """The folder of one evaluation."""
        # A given checkpoint has one run folder for all seeds of its evaluation.
        repeat = f"-seed{measurement.seed}" if measurement.seed != measurement.backbone.seed else ""
        return self.run(measurement.backbone) / f"eval-{measurement.dataset}{repeat}"

    def figures(self, measurement: Measurement) -> Path:
        """The figures of one evaluation."""
        return RunFolder(self.evaluation(measurement)).evaluation_file

    def given(self, backbone: Backbone) -> str | None:
        """The checkpoint that was named for a pretrained backbone."""
        if backbone.method not in PRETRAINED:
            return None
        named: str | None = getattr(self.weights, f"{backbone.pretraining}_{backbone.network}")
        return named

    def checkpoint(self, backbone: Backbone) -> str:
        """What is loaded for a backbone."""
        return self.given(backbone) or str(self.run(backbone))

    def trained(self, backbone: Backbone) -> bool:
        """Whether a training is finished; one that was stopped has a backbone too, that of its last step."""
        # Supervised training writes its backbone once, at the end; the others write a summary.
        run = RunFolder(self.run(backbone))
        finished = backbone.method == "sup_S" or run.read_summary().get("finished", False)
        return finished and run.backbone_file.exists()

    def evaluated(self, measurement: Measurement) -> bool:
        """Whether an evaluation is there."""
        return self.figures(measurement).exists()


def read_json(path: Path) -> dict[str, Any]:
    """The values of a file that is written whole; none where there is no file."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return values


def plain(config: TrainConfig | EvalConfig) -> dict[str, Any]:
    """A configuration as its file reads: lists for tuples."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values
