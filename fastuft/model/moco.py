"""MoCoV2's pair of encoders (He et al. 2020, Chen et al. 2020)."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastuft.model.backbone import Backbone, Traits
from fastuft.model.batchnorm import one_statistics_update, statistics_inside_only


class ProjectionHead(nn.Sequential):
    """MoCoV2's MLP head: in -> in -> dim, with a ReLU in between."""

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__(nn.Linear(num_features, num_features), nn.ReLU(inplace=True), nn.Linear(num_features, dim))

    if TYPE_CHECKING:  # nn.Module's own returns Any

        def __call__(self, features: Tensor) -> Tensor: ...


class Encoder(nn.Module):
    """Backbone and projection head: images [B, 3, H, W] -> embeddings [B, dim], not normalized.

    With ``frozen_statistics``, the backbone's BatchNorm uses its running statistics in training too.
    """

    frozen_statistics = False

    def __init__(self, backbone: Backbone, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = ProjectionHead(backbone.num_features, dim)

    def train(self, mode: bool = True) -> Encoder:
        """Set training mode; frozen BatchNorm stays in eval mode, so it neither uses nor updates batch statistics."""
        super().train(mode)
        if self.frozen_statistics:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [B, dim], not of unit length, of normalized images [B, 3, H, W]."""
        tracking = statistics_inside_only(self.backbone) if self.backbone.recompute else nullcontext()
        with one_statistics_update(), tracking:
            features = self.backbone(images)
        return self.head(features)

    if TYPE_CHECKING:  # nn.Module's own returns Any

        def __call__(self, images: Tensor) -> Tensor: ...


class MoCo(nn.Module):
    """The query encoder f_q, and the key encoder f_k, its exponential moving average, which gets no gradient.

    The key encoder has its own BatchNorm statistics: only parameters are averaged, as in MoCo. It is deterministic: only its
    BatchNorm layers are ever in training mode, so drop path and dropout are off.

    Args:
        backbone: f_q's backbone; copied for f_k.
        dim: width D of the embeddings.
    """

    def __init__(self, backbone: Backbone, dim: int = 128) -> None:
        super().__init__()
        self.query_encoder = Encoder(backbone, dim)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)

    def adopt(self, traits: Traits) -> None:
        """Make both backbones adopt the traits of a checkpoint's network."""
        for encoder in (self.query_encoder, self.key_encoder):
            encoder.backbone.adopt(traits)

    def train(self, mode: bool = True) -> MoCo:
        """Training mode of the query encoder, and of the key encoder's BatchNorm unless it is frozen."""
        super().train(mode)
        norms = [m for m in self.key_encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        self.key_encoder.eval()
        for norm in norms:
            norm.train()
        return self

    @torch.no_grad()
    def copy_query_to_key(self) -> None:
        """Make f_k equal to f_q, including buffers, as at the start of training."""
        self.key_encoder.load_state_dict(self.query_encoder.state_dict())

    @torch.no_grad()
    def momentum_update_(self, momentum: float) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q, in one fused pass over all parameters."""
        torch._foreach_lerp_(list(self.key_encoder.parameters()), list(self.query_encoder.parameters()), 1.0 - momentum)
