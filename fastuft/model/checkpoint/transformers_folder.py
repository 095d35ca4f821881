"""The names of transformers' networks in this package and in timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_RESNETS: dict[tuple[str, tuple[object, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
}
# (hidden size, blocks) of the standard sizes.
_VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
_CONVNEXTS: dict[tuple[tuple[object, ...], tuple[object, ...]], str] = {
    ((2, 2, 6, 2), (40, 80, 160, 320)): "atto",
    ((3, 3, 9, 3), (96, 192, 384, 768)): "tiny",
    ((3, 3, 27, 3), (96, 192, 384, 768)): "small",
    ((3, 3, 27, 3), (128, 256, 512, 1024)): "base",
    ((3, 3, 27, 3), (192, 384, 768, 1536)): "large",
}


def _tuple(values: object) -> tuple[object, ...]:
    return tuple(values) if isinstance(values, list) else ()


def network_of(config: Mapping[str, Any]) -> str | None:
    """The name of a network for ``model.arch``; None for non-standard sizes, which the user must name.

    Args:
        config: the content of ``config.json``.

    Raises:
        ValueError: this kind of network cannot be read.
    """
    kind, depths, widths = config.get("model_type"), _tuple(config.get("depths")), _tuple(config.get("hidden_sizes"))
    size = _VITS.get((config.get("hidden_size", 0), config.get("num_hidden_layers", 0)))
    patch, image = config.get("patch_size"), config.get("image_size")
    if kind == "resnet":
        return _RESNETS.get((str(config.get("layer_type")), depths))
    if kind in ("convnext", "dinov3_convnext"):
        convnext = _CONVNEXTS.get((depths, widths))
        return convnext and f"timm:convnext_{convnext}"
    names = {
        "vit": f"timm:vit_{size}_patch{patch}_{image}",
        "dinov2": f"timm:vit_{size}_patch{patch}_dinov2",
        "dinov2_with_registers": f"timm:vit_{size}_patch{patch}_reg{config.get('num_register_tokens')}_dinov2",
        "dinov3_vit": f"timm:vit_{size}_patch{patch}_dinov3_qkvb",
    }
    if kind not in names:
        raise ValueError(
            f"model_type={kind!r} cannot be read; choose a transformers folder of resnet, {', '.join(names)}, convnext or "
            "dinov3_convnext"
        )
    return names[kind] if size else None
