"""Projection heads in checkpoints: the names of their layers in known layouts, and their loading."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastuft.model.checkpoint.fitting import check_usable
from fastuft.model.checkpoint.matching import Match
from fastuft.model.moco import Encoder

# Names of the heads in known layouts, relative to the encoder that contains the backbone.
_HEADS = (("fc.0.", "fc.2."), ("head.0.", "head.2."), ("projection_head.layers.0.", "projection_head.layers.2."))


def _find_head(tensors: Mapping[str, Tensor], prefix: str, head: Mapping[str, Tensor]) -> dict[str, str]:
    """{head name: file name} of a two-layer head of the right shapes beside or around the backbone, or nothing."""
    around = prefix.rstrip(".").removesuffix(".network").rpartition(".")[0]  # timm networks are one level deeper
    for base in (prefix, f"{around}." if around else ""):
        for first, second in _HEADS:
            found: dict[str, str] = {}
            for name, layer in (("0.", first), ("2.", second)):
                found |= {f"{name}{kind}": f"{base}{layer}{kind}" for kind in ("weight", "bias")}
            if all(file in tensors and tensors[file].shape == head[name].shape for name, file in found.items()):
                return found
    return {}


def load_head(encoder: Encoder, match: Match, tensors: Mapping[str, Tensor], file: str) -> tuple[str, ...]:
    """Load the head beside the backbone, if there is one; returns its names in the file."""
    wanted = encoder.head.state_dict()
    head = _find_head(tensors, match.prefix, wanted)
    for name, source in head.items():
        check_usable(source, tensors[source], wanted[name], file)
    if head:
        encoder.head.load_state_dict({name: tensors[source] for name, source in head.items()})
    return tuple(head.values())
