"""The layout of a grid's output folder::

runs/<backbone>/                   a run folder per backbone
runs/<backbone>/eval-<data set>/   its evaluation
datasets/, source/, features/      class folders of the data sets, the drawn source share, cached features
data/                              the data sets as published, if a scale makes its own
locks/                             which process works on which part
results.jsonl, comparison.*        the figures of all trials, and the tables with the paper's figures
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
    """The folders and files of a grid, and which of its parts are finished.

    Args:
        out: the output folder.
        weights: checkpoints named for pretrained backbones, which are then not trained.
    """

    out: Path
    weights: WeightsConfig

    @property
    def data(self) -> Path:
        """Data sets as published, if a scale makes its own."""
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
        """The figures of all trials."""
        return self.out / "results.jsonl"

    @property
    def comparison(self) -> Path:
        """The tables with the paper's figures, as text."""
        return self.out / "comparison.txt"

    @property
    def figure_1(self) -> Path:
        """The page with the maps of Figure 1."""
        return self.out / "figure1.html"

    def source(self, share: str) -> Path:
        """Images extracted from the source's tar shards."""
        return self.out / "source" / share

    def run(self, backbone: Backbone) -> Path:
        """A backbone's run folder."""
        return self.out / "runs" / backbone.name

    def summary(self, backbone: Backbone) -> Path:
        """The summary of a training."""
        return RunFolder(self.run(backbone)).summary_file

    def evaluation(self, measurement: Measurement) -> Path:
        """The folder of one evaluation."""
        # A given checkpoint has one run folder for evaluations with all seeds.
        repeat = f"-seed{measurement.seed}" if measurement.seed != measurement.backbone.seed else ""
        return self.run(measurement.backbone) / f"eval-{measurement.dataset}{repeat}"

    def evaluation_file(self, measurement: Measurement) -> Path:
        """The figures of one evaluation."""
        return RunFolder(self.evaluation(measurement)).evaluation_file

    def given(self, backbone: Backbone) -> str | None:
        """The checkpoint that was named for a pretrained backbone."""
        if backbone.method not in PRETRAINED:
            return None
        named: str | None = getattr(self.weights, f"{backbone.pretraining}_{backbone.network}")
        return named

    def checkpoint(self, backbone: Backbone) -> str:
        """The checkpoint to load for a backbone."""
        return self.given(backbone) or str(self.run(backbone))

    def trained(self, backbone: Backbone) -> bool:
        """Whether a training is finished; a stopped one has a backbone too, that of its last step."""
        # Supervised training writes its backbone once, at the end; the others write a summary.
        run = RunFolder(self.run(backbone))
        finished = backbone.method == "sup_S" or run.read_summary().get("finished", False)
        return finished and run.backbone_file.exists()

    def evaluated(self, measurement: Measurement) -> bool:
        """Whether an evaluation exists."""
        return self.evaluation_file(measurement).exists()


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if the file does not exist."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return values


def plain(config: TrainConfig | EvalConfig) -> dict[str, Any]:
    """A configuration as it is read from a file, with lists for tuples."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values
