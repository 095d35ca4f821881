"""Which parameters the optimizer treats alike: by depth in the network, and by whether they decay."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

from torch import nn

from fastuft.config import OptimConfig
from fastuft.model import Encoder

Parameters = list[nn.Parameter] | list[dict[str, Any]]


def parameter_groups(encoder: Encoder, config: OptimConfig) -> Parameters:
    """The parameters that take gradients: as one list where all are treated alike, else as groups.

    A group of layer l of L has ``lr_scale`` = layer_decay ** (L - l), counted so that the head has 1 (Clark et al. 2020,
    ELECTRA; Bao et al. 2022, BEiT); ``weight_decay`` is 0 in those that do not decay: vectors (norms and biases), and what
    the network exempts (position embeddings, tokens).

    Args:
        encoder: backbone and head.
        config: layer_decay, decay_norms and the optimizer.

    Raises:
        ValueError: a rate per layer is asked for and the network's layers have no known order.
    """
    named = [(name, parameter) for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    decay_all = config.decay_norms and config.optimizer != "lars"
    if decay_all and config.layer_decay == 1.0:
        return [parameter for _, parameter in named]
    exempt = tuple(f"backbone.{name}" for name in encoder.backbone.undecayed())
    depths = (
        {f"backbone.{name}": depth for name, depth in encoder.backbone.layers().items()}
        if config.layer_decay < 1
        else {}
    )
    head = max(depths.values(), default=0) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named:
        depth = depths.get(name, head)
        decays = decay_all or (parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in exempt))
        new = {
            "params": [],
            "lr_scale": config.layer_decay ** (head - depth),
            **({} if decays else {"weight_decay": 0.0}),
        }
        groups.setdefault((depth, decays), new)["params"].append(parameter)
    return list(groups.values())
