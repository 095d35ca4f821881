"""The average of trained weights with those of the start, which a run exports in their place."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from fastuft.config import TrainConfig
from fastuft.model import Backbone, export_backbone, load_backbone
from fastuft.runfolder import RunFolder
from fastuft.trainer.distributed import Ranks


@dataclass(frozen=True)
class StartAverage:
    """Averages weights with the start's, as WiSE-FT does (Wortsman et al., CVPR 2022).

    Training goes on from the weights as they are: only what is looked at, watched and exported is averaged.

    Args:
        share: the start's share of the average, in [0, 1]; 0 leaves the weights as they are.
        start: the start's tensors by their names in the backbone; not used if the share is 0.
    """

    share: float
    start: Mapping[str, Tensor]

    @torch.no_grad()
    def of(self, backbone: Backbone) -> Backbone:
        """The averaged backbone, a copy; the backbone itself if the share is 0.

        Weights and running statistics are averaged; counters are the trained network's.
        """
        if not self.share:
            return backbone
        averaged = deepcopy(backbone)
        for name, value in averaged.state_dict().items():
            if value.is_floating_point():
                value.lerp_(self.start[name].to(value), self.share)
        return averaged


def average_with_start(
    config: TrainConfig, folder: RunFolder, backbone: Backbone, ranks: Ranks, *, resumed: bool
) -> StartAverage:
    """The average that ``config`` asks for; a new run saves its start if that, or the verdict, will need it.

    Args:
        config: the run.
        folder: its folder, which has the start if the run was resumed.
        backbone: the backbone of a new run, before its first step.
        ranks: the processes.
        resumed: whether the run is a resumed one.

    Raises:
        ValueError: the start of a resumed run is missing or damaged.
        OSError: the start could not be written.
    """
    share = config.start_share
    if not resumed and ranks.is_main and (share or config.select == "judged"):
        export_backbone(backbone, folder.start_file)
    if not share:
        return StartAverage(0.0, {})
    if resumed:
        try:
            backbone = load_backbone(folder.start_file)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"start_share={share}: the start, with which the exported weights are averaged, cannot be read ({error}); "
                "restore the file, or resume with start_share 0"
            ) from error
    return StartAverage(share, {name: value.detach().cpu().clone() for name, value in backbone.state_dict().items()})
