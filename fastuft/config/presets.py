"""Optimizer and model options by family of networks, each with its source.

A preset is a set of defaults; explicit options win. For ResNets these are the paper's recipe, the defaults of all options.
Where MoCo v3 and the DINO papers differ, the presets follow MoCo v3, because it uses the same loss.
"""

from __future__ import annotations

import re
from typing import Literal

Family = Literal["resnet", "vit", "convnext"]
Preset = Literal["auto", "none", "resnet", "vit", "convnext"]
Optimizer = Literal["sgd", "adamw", "lars", "apex_fused_sgd"]

# timm's names of ViTs with a patch projection and tokens, and of other networks that are trained like ViTs.
_VIT = re.compile(r"(vit_|deit|eva|beit|flexivit|cait|dino|aimv2|samvit|test_vit)")
_LIKE_VIT = re.compile(
    r"(swin|xcit|pvt|poolformer|caformer|levit|coat|volo|twins|crossvit|mixer|gmlp|resmlp|maxvit|mvit)"
)
_CONVNEXT = re.compile(r"(convnext|inceptionnext|convformer|test_convnext)")

WARMUP = 0.1  # of the epochs: DINO and DINOv2 warm up for 10 of 100, MoCo v3 for 40 of 300


def _warmup(epochs: int | str) -> dict[str, object]:
    """The warm-up; left open while the number of epochs is open."""
    return {"optim.warmup_epochs": WARMUP * epochs} if isinstance(epochs, int) else {}


def _adamw(epochs: int | str) -> dict[str, object]:
    """AdamW as MoCo v3 trains ViTs (Chen, Xie and He 2021, Section 4.1; CONFIG.md of its code): rate 1.5e-4 for a batch of 256,
    scaled linearly, weight decay 0.1. Norms, biases and tokens are not decayed, gradients are clipped at norm 3 (Caron et
    al. 2021, DINO, and Oquab et al. 2023, DINOv2). Not adopted: MoCo v3's key momentum, which rises from 0.99 to 1. MoCo v3
    has no queue, and a queue needs keys of nearly the same encoder.
    """
    return {
        "optim.optimizer": "adamw",
        "optim.lr": 1.5e-4,
        "optim.scale_lr": True,
        "optim.weight_decay": 0.1,
        "optim.decay_norms": False,
        "optim.clip_grad": 3.0,
        **_warmup(epochs),
    }


def _lars(epochs: int | str) -> dict[str, object]:
    """LARS as MoCo v3 trains ResNets (Chen, Xie and He 2021; CONFIG.md of its code, 300 epochs): rate 0.3 for a batch of 256,
    scaled linearly, momentum 0.9, weight decay 1e-6, 10 epochs of warm-up. It was
    made for batches of thousands (You et al. 2017).
    """
    return {
        "optim.optimizer": "lars",
        "optim.lr": 0.3,
        "optim.scale_lr": True,
        "optim.momentum": 0.9,
        "optim.weight_decay": 1e-6,
        "optim.decay_norms": False,
        **_warmup(epochs),
    }


def _vit(arch: str, epochs: int | str) -> dict[str, object]:
    """AdamW, a rate that falls by a factor of 0.9 per layer from the head down (DINOv2, ``layerwise_decay``), and a frozen
    patch projection (MoCo v3, Section 4.2: more stable and not worse).
    """
    frozen = {"model.freeze_patch": True} if _VIT.match(arch.removeprefix("timm:")) else {}
    return {**_adamw(epochs), **frozen, "optim.layer_decay": 0.9}


def _convnext(epochs: int | str) -> dict[str, object]:
    """AdamW with ConvNeXt's own weight decay, 0.05 (Liu et al. 2022, Table 5), and the layer-wise rates of the ViTs."""
    return {**_adamw(epochs), "optim.weight_decay": 0.05, "optim.layer_decay": 0.9}


def family_of(arch: str) -> Family:
    """The family whose preset suits a network, by its name; any other network counts as a ResNet."""
    name = arch.removeprefix("timm:")
    if arch.startswith("timm:") and (_VIT.match(name) or _LIKE_VIT.match(name)):
        return "vit"
    return "convnext" if arch.startswith("timm:") and _CONVNEXT.match(name) else "resnet"


def preset_options(
    family: Family, arch: str, epochs: int | str, optimizer: Optimizer | None = None
) -> dict[str, object]:
    """The values that a preset sets, by dotted option.

    Args:
        family: resnet, vit or convnext.
        arch: the network.
        epochs: epochs of the run, of which the warm-up is a part; a text if they are still open.
        optimizer: the chosen optimizer; None takes the family's. The values always suit the optimizer, because the rates
            of one do not suit another.
    """
    own: Optimizer = "sgd" if family == "resnet" else "adamw"
    if optimizer not in (None, own):
        return {"adamw": _adamw, "lars": _lars}[optimizer](epochs) if optimizer in ("adamw", "lars") else {}
    if family == "vit":
        return _vit(arch, epochs)
    return _convnext(epochs) if family == "convnext" else {}
