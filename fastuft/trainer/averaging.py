"""The average of the trained weights with those of the start, which a run exports."""

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
    """Averages the trained weights with those of the start, as in WiSE-FT (Wortsman et al., CVPR 2022).

    Looks, evaluations and exports use the average; training continues from the weights themselves.

    Args:
        share: share of the start in the average, in [0, 1]; 0 turns averaging off.
        start: tensors of the start by their names in the backbone; unused if the share is 0.
    """

    share: float
    start: Mapping[str, Tensor]

    @torch.no_grad()
    def of(self, backbone: Backbone) -> Backbone:
        """An averaged copy of the backbone, or the backbone itself if the share is 0.

        Weights and running statistics are averaged; counters come from the trained network.
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
    """The average that ``config`` asks for. A new run saves its start if the average or the verdict will need it.

    Args:
        config: the run.
        folder: its folder, which has the start of a resumed run.
        backbone: the backbone of a new run, before its first step.
        ranks: the processes.
        resumed: whether the run was resumed.

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
