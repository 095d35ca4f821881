"""Layouts of ViT, DINOv2, DINOv3 and ConvNeXt; backbone names are timm's."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from fastuft.model.checkpoint.layout import Layout, Rules, Sources, divided, joined, renamed

_BLOCK = r"blocks\.(\d+)\."


def _query_key_value(block: str, names: tuple[str, str, str]) -> Rules:
    """Rules for timm's joint projection, for a library with three."""
    several = [" ".join(rf"{block}{name}.{kind}" for name in names) for kind in ("weight", "bias")]
    return [(rf"{_BLOCK}attn\.qkv\.weight", several[0]), (rf"{_BLOCK}attn\.qkv\.bias", several[1])]


_HF_EMBEDDINGS: Rules = [
    (r"cls_token", "embeddings.cls_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(.+)", r"embeddings.patch_embeddings.projection.\1"),
    (r"norm\.(.+)", r"layernorm.\1"),
]
_HF_LAYER = r"encoder.layer.\1."
_HF_ATTENTION: Rules = [
    *_query_key_value(_HF_LAYER, ("attention.attention.query", "attention.attention.key", "attention.attention.value")),
    (rf"{_BLOCK}attn\.proj\.(.+)", rf"{_HF_LAYER}attention.output.dense.\2"),
]

HF_VIT = Layout(
    "transformers ViT",
    renamed(
        [
            *_HF_EMBEDDINGS,
            *_HF_ATTENTION,
            (rf"{_BLOCK}norm1\.(.+)", rf"{_HF_LAYER}layernorm_before.\2"),
            (rf"{_BLOCK}norm2\.(.+)", rf"{_HF_LAYER}layernorm_after.\2"),
            (rf"{_BLOCK}mlp\.fc1\.(.+)", rf"{_HF_LAYER}intermediate.dense.\2"),
            (rf"{_BLOCK}mlp\.fc2\.(.+)", rf"{_HF_LAYER}output.dense.\2"),
        ]
    ),
)

_HF_DINOV2_BLOCKS: Rules = [
    *_HF_ATTENTION,
    (rf"{_BLOCK}ls(\d)\.gamma", rf"{_HF_LAYER}layer_scale\2.lambda1"),
    (rf"{_BLOCK}((?:norm\d|mlp\.fc\d)\..+)", rf"{_HF_LAYER}\2"),
]
HF_DINOV2 = Layout("transformers DINOv2", renamed([*_HF_EMBEDDINGS, *_HF_DINOV2_BLOCKS]))
# The gated MLP of the giant network.
HF_DINOV2_GATED = Layout(
    "transformers DINOv2 with gated MLP",
    renamed(
        [
            (rf"{_BLOCK}mlp\.fc1\.(.+)", rf"{_HF_LAYER}mlp.weights_in.\2"),
            (rf"{_BLOCK}mlp\.fc2\.(.+)", rf"{_HF_LAYER}mlp.weights_out.\2"),
            *_HF_EMBEDDINGS,
            *_HF_DINOV2_BLOCKS,
        ]
    ),
)


def _with_registers(name: str, parts: Sequence[Tensor]) -> Tensor:
    """timm's networks with registers add the class token's position embedding to the token itself."""
    if name == "cls_token":
        token, positions = parts
        return token + positions[:, :1]
    return parts[0][:, 1:] if name == "pos_embed" else joined(name, parts)


def _without_registers(name: str, tensor: Tensor, count: int) -> Sequence[Tensor | None]:
    """The reverse: the class token's position embedding is zero."""
    if name == "cls_token":
        return [tensor, None]
    if name == "pos_embed":
        return [torch.cat([torch.zeros_like(tensor[:, :1]), tensor], 1)]
    return divided(name, tensor, count)


HF_DINOV2_REGISTERS = Layout(
    "transformers DINOv2 with registers",
    renamed(
        [
            (r"cls_token", "embeddings.cls_token embeddings.position_embeddings"),
            (r"reg_token", "embeddings.register_tokens"),
            *_HF_EMBEDDINGS,
            *_HF_DINOV2_BLOCKS,
        ]
    ),
    _with_registers,
    _without_registers,
)


def _without_chunks(name: str) -> str:
    """DINOv2's training code numbers chunks of blocks too: ``blocks.1.7`` is block 7."""
    return re.sub(r"\bblocks\.\d+\.(\d+\.)", r"blocks.\1", name)


_GATED: Rules = [
    (rf"{_BLOCK}mlp\.fc1\.(.+)", r"blocks.\1.mlp.w12.\2"),
    (rf"{_BLOCK}mlp\.fc2\.(.+)", r"blocks.\1.mlp.w3.\2"),
]
DINOV2 = Layout("DINOv2", renamed([(r"(.+)", r"\1")]), canonical=_without_chunks)
DINOV2_GATED = Layout("DINOv2 with gated MLP", renamed([*_GATED, (r"(.+)", r"\1")]), canonical=_without_chunks)
DINOV2_REGISTERS = Layout(
    "DINOv2 with registers",
    renamed([(r"cls_token", "cls_token pos_embed"), (r"reg_token", "register_tokens"), (r"(.+)", r"\1")]),
    _with_registers,
    _without_registers,
    _without_chunks,
)


def _dinov3_join(name: str, parts: Sequence[Tensor]) -> Tensor:
    """timm has separate biases for query and value, and none for the key."""
    if name.endswith(("attn.q_bias", "attn.v_bias")):
        query, _, value = parts[0].chunk(3)
        return query if name.endswith("q_bias") else value
    return joined(name, parts)


DINOV3 = Layout(
    "DINOv3",
    renamed(
        [
            (r"reg_token", "storage_tokens"),
            (rf"{_BLOCK}gamma_(\d)", r"blocks.\1.ls\2.gamma"),
            (rf"{_BLOCK}attn\.[qv]_bias", r"blocks.\1.attn.qkv.bias"),
            (rf"{_BLOCK}mlp\.fc1_g\.(.+)", r"blocks.\1.mlp.w1.\2"),
            (rf"{_BLOCK}mlp\.fc1_x\.(.+)", r"blocks.\1.mlp.w2.\2"),
            (r"(.+)", r"\1"),
        ]
    ),
    _dinov3_join,
    canonical=_without_chunks,
)
DINOV3_GATED = Layout(
    "DINOv3 with gated MLP",
    lambda name: tuple(s.replace(".mlp.fc2.", ".mlp.w3.") for s in DINOV3.sources(name)),
    _dinov3_join,
    canonical=_without_chunks,
)

_HF3 = r"layer.\1."
_HF3_COMMON: Rules = [
    (r"cls_token", "embeddings.cls_token"),
    (r"reg_token", "embeddings.register_tokens"),
    (r"patch_embed\.proj\.(.+)", r"embeddings.patch_embeddings.\1"),
    (r"norm\.(.+)", r"norm.\1"),
    (rf"{_BLOCK}gamma_(\d)", rf"{_HF3}layer_scale\2.lambda1"),
    (rf"{_BLOCK}attn\.([qv])_bias", rf"{_HF3}attention.\2_proj.bias"),
    (rf"{_BLOCK}attn\.proj\.(.+)", rf"{_HF3}attention.o_proj.\2"),
    *_query_key_value(_HF3, ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    (rf"{_BLOCK}(norm\d\..+)", rf"{_HF3}\2"),
    (rf"{_BLOCK}mlp\.fc2\.(.+)", rf"{_HF3}mlp.down_proj.\2"),
    (rf"{_BLOCK}mlp\.fc1_g\.(.+)", rf"{_HF3}mlp.gate_proj.\2"),
    (rf"{_BLOCK}mlp\.fc1(?:_x)?\.(.+)", rf"{_HF3}mlp.up_proj.\2"),
]
HF_DINOV3 = Layout("transformers DINOv3", renamed(_HF3_COMMON))


def _convnext(stem: tuple[str, str], down: tuple[str, str], block: str, parts: dict[str, str], norm: str) -> Sources:
    """Sources of timm's ConvNeXt names.

    Args:
        stem: the stem's convolution and norm.
        down: a later stage's norm and convolution; ``\\1`` is the stage.
        block: a block's path; ``\\1`` is the stage, ``\\2`` the block.
        parts: timm's names inside a block -> the library's.
        norm: the last norm.
    """
    inside = r"stages\.(\d+)\.blocks\.(\d+)\."
    return renamed(
        [
            *((rf"stem\.{i}\.(.+)", rf"{stem[i]}.\1") for i in (0, 1)),
            *((rf"stages\.(\d+)\.downsample\.{i}\.(.+)", rf"{down[i]}.\2") for i in (0, 1)),
            *((rf"{inside}{re.escape(ours)}(\..+|)", rf"{block}{theirs}\3") for ours, theirs in parts.items()),
            (r"head\.norm\.(.+)", rf"{norm}.\1"),
        ]
    )


def _as_linear(name: str, tensor: Tensor, count: int) -> Sequence[Tensor | None]:
    """timm's small networks have the MLP's matrices as 1x1 convolutions."""
    return [tensor.flatten(1) if re.search(r"\.mlp\.fc\d\.weight$", name) else tensor]


_AUTHORS_PARTS = {
    "gamma": "gamma",
    "conv_dw": "dwconv",
    "norm": "norm",
    "mlp.fc1": "pwconv1",
    "mlp.fc2": "pwconv2",
}
CONVNEXT = Layout(
    "ConvNeXt",
    _convnext(
        ("downsample_layers.0.0", "downsample_layers.0.1"),
        (r"downsample_layers.\1.0", r"downsample_layers.\1.1"),
        r"stages.\1.\2.",
        _AUTHORS_PARTS,
        "norm",
    ),
    divide=_as_linear,
)
HF_CONVNEXT = Layout(
    "transformers ConvNeXt",
    _convnext(
        ("embeddings.patch_embeddings", "embeddings.layernorm"),
        (r"encoder.stages.\1.downsampling_layer.0", r"encoder.stages.\1.downsampling_layer.1"),
        r"encoder.stages.\1.layers.\2.",
        {**_AUTHORS_PARTS, "gamma": "layer_scale_parameter", "norm": "layernorm"},
        "layernorm",
    ),
    divide=_as_linear,
)
HF_DINOV3_CONVNEXT = Layout(
    "transformers DINOv3 ConvNeXt",
    _convnext(
        ("stages.0.downsample_layers.0", "stages.0.downsample_layers.1"),
        (r"stages.\1.downsample_layers.0", r"stages.\1.downsample_layers.1"),
        r"stages.\1.layers.\2.",
        {
            "gamma": "gamma",
            "conv_dw": "depthwise_conv",
            "norm": "layer_norm",
            "mlp.fc1": "pointwise_conv1",
            "mlp.fc2": "pointwise_conv2",
        },
        "layer_norm",
    ),
    divide=_as_linear,
)

TRANSFORMER_LAYOUTS = (
    DINOV2,
    DINOV2_REGISTERS,
    DINOV2_GATED,
    DINOV3,
    DINOV3_GATED,
    HF_VIT,
    HF_DINOV2,
    HF_DINOV2_REGISTERS,
    HF_DINOV2_GATED,
    HF_DINOV3,
    CONVNEXT,
    HF_CONVNEXT,
    HF_DINOV3_CONVNEXT,
)
