"""Options of the network: ``model.*``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastuft.config.checks import AtLeast1, AutoStem, Range, check_values, is_auto

BatchNormMode = Literal["auto", "plain", "split", "shuffle", "sync", "frozen"]
Pool = Literal["own", "cls", "mean"]


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, projection head and key encoder.

    Args:
        arch: auto (on the command line and in ``fastuft.finetune``: what ``init`` names, else resnet50),
            resnet18 | resnet34 | resnet50 | resnet101, resnet_tiny (the demo's three-block network),
            bit_resnet50 | bit_resnet101 (ResNet-v2 with GroupNorm and weight standardization), or timm:NAME.
        stem: imagenet (7x7, stride 2, max-pool) or small (3x3, no max-pool; stride 1, or 2 in resnet_tiny);
            auto as for arch, else imagenet. Neither is inferred from the tensors.
        head_dim: width D of the embedding.
        bn: batch statistics of the encoders; auto is split on one device (plain with ``recipe: auto``) and shuffle on
            several; frozen keeps those of ``init``. Networks without BatchNorm ignore it.
        bn_group: images per group in ``split``; must divide the batch of one device.
        pool: features of a ViT: own (as in the network or the checkpoint), cls (the class token) or mean (of the patch
            tokens, without class and register tokens).
        drop_path: rate of stochastic depth in the query encoder's last block, rising from 0 in the first; the key encoder
            has none.
        freeze_patch: do not train a ViT's patch projection, whose gradient makes contrastive training of ViTs unstable
            (Chen, Xie and He 2021).
    """

    arch: str = "resnet50"
    stem: AutoStem = "imagenet"
    head_dim: AtLeast1 = 128
    bn: BatchNormMode = "auto"
    bn_group: Annotated[int, Range(2)] = 32
    pool: Pool = "own"
    drop_path: Annotated[float, Range(0.0, 0.99)] = 0.0
    freeze_patch: bool = False

    def __post_init__(self) -> None:
        check_values(self, "model")
        for name in ("arch", "stem"):
            if is_auto(getattr(self, name)):
                raise ValueError(f"model.{name}='auto' is settled before a run is described; name the network's")
