"""What our residual networks share: a chain of blocks, whose activations may be computed twice to save memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastuft.model.backbone import Backbone

_BLOCK = re.compile(r"layer\d+\.\d+\.")


class ResidualNetwork(Backbone):
    """A backbone whose blocks are ``layer1``, ``layer2``, ..., ``num_stages`` of them."""

    num_stages: int

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks from the images on."""
        for stage in range(self.num_stages):
            yield from self.get_submodule(f"layer{stage + 1}").children()

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """The block's output; with ``recompute`` its activations are not kept for the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        output: Tensor = block(x)
        return output

    def layers(self) -> dict[str, int]:
        """0 for the stem, then one per block; a last norm is with the last block."""
        names = [name for name, _ in self.named_parameters()]
        found = dict.fromkeys(match[0] for name in names if (match := _BLOCK.match(name)))
        depth = {prefix: index + 1 for index, prefix in enumerate(found)}
        last = len(depth)
        return {
            name: depth[match[0]] if (match := _BLOCK.match(name)) else last if name.startswith("norm.") else 0
            for name in names
        }
