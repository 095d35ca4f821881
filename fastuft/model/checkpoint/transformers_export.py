"""Backbones as folders that ``from_pretrained`` of transformers loads without missing or unused tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastuft.atomic import write_whole
from fastuft.model.backbone import Backbone
from fastuft.model.checkpoint.preprocessing import transformers_preprocessor
from fastuft.model.checkpoint.resnet_layouts import TRANSFORMERS_RESNET
from fastuft.model.checkpoint.transformer_layouts import (
    HF_CONVNEXT,
    HF_DINOV2,
    HF_DINOV2_GATED,
    HF_DINOV2_REGISTERS,
    HF_DINOV3,
    HF_VIT,
)
from fastuft.model.resnet import Bottleneck, ResNet
from fastuft.model.timm_network import TimmBackbone

State = Mapping[str, Tensor]


def _count(state: State, pattern: str) -> int:
    """The number of different values of the pattern's group among the names."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _eps(network: nn.Module, name: str) -> float:
    norm = network.get_submodule(name)
    return float(norm.eps) if isinstance(norm, nn.LayerNorm) else 1e-6


def _resnet(backbone: ResNet) -> tuple[dict[str, object], dict[str, Tensor]]:
    if backbone.stem != "imagenet":
        raise ValueError(f"layout='transformers' has no ResNet with stem {backbone.stem!r}; export with layout fastuft")
    state = backbone.state_dict()
    stages = range(1, backbone.num_stages + 1)
    blocks = [_count(state, rf"layer{stage}\.(\d+)\.") for stage in stages]
    first = backbone.get_submodule("layer1.0")
    last = "conv3" if isinstance(first, Bottleneck) else "conv2"
    config = {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": state["conv1.weight"].shape[0],
        "hidden_sizes": [state[f"layer{stage}.0.{last}.weight"].shape[0] for stage in stages],
        "depths": blocks,
        "layer_type": "bottleneck" if last == "conv3" else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": backbone.traits.stride_in_1x1,
    }
    return config, TRANSFORMERS_RESNET.export(state)


def _convnext(network: nn.Module, state: State) -> tuple[dict[str, object], dict[str, Tensor]]:
    stages = range(_count(state, r"stages\.(\d+)\."))
    config = {
        "architectures": ["ConvNextModel"],
        "model_type": "convnext",
        "num_channels": 3,
        "patch_size": state["stem.0.weight"].shape[-1],
        "num_stages": len(stages),
        "hidden_sizes": [state[f"stages.{stage}.blocks.0.conv_dw.weight"].shape[0] for stage in stages],
        "depths": [_count(state, rf"stages\.{stage}\.blocks\.(\d+)\.") for stage in stages],
        "hidden_act": "gelu",
        "layer_norm_eps": _eps(network, "head.norm"),
    }
    return config, HF_CONVNEXT.export(state)


def _vit_config(backbone: TimmBackbone, state: State) -> dict[str, object]:
    """The common part of all ViT configurations."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    heads = getattr(backbone.network.get_submodule("blocks.0.attn"), "num_heads", 0)
    return {
        "num_channels": 3,
        "hidden_size": width,
        "num_hidden_layers": _count(state, r"blocks\.(\d+)\."),
        "num_attention_heads": int(heads),
        "hidden_act": "gelu",
        "layer_norm_eps": _eps(backbone.network, "norm"),
        "image_size": backbone.input_size,
        "patch_size": patch,
    }


def _vit(backbone: TimmBackbone, state: State) -> tuple[dict[str, object], dict[str, Tensor]]:
    width = backbone.num_features
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        **_vit_config(backbone, state),
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "pooler_output_size": width,
        "pooler_act": "linear",
    }
    # transformers' pooler is a layer on the class token; as the identity, it passes the features on.
    return config, {
        **HF_VIT.export(state),
        "pooler.dense.weight": torch.eye(width),
        "pooler.dense.bias": torch.zeros(width),
    }


def _dinov2(backbone: TimmBackbone, state: State) -> tuple[dict[str, object], dict[str, Tensor]]:
    registers, width = "reg_token" in state, backbone.num_features
    inner, outer = state["blocks.0.mlp.fc1.weight"].shape[0], state["blocks.0.mlp.fc2.weight"].shape[1]
    gated = inner == 2 * outer
    if gated and registers:
        raise ValueError("layout='transformers' has no DINOv2 with registers and a gated MLP; export with layout timm")
    if gated and outer != (int(4 * width * 2 / 3) + 7) // 8 * 8:
        raise ValueError(
            f"layout='transformers' has no DINOv2 of width {width} whose gated MLP is {outer} wide; export with layout timm"
        )
    layout = HF_DINOV2_REGISTERS if registers else HF_DINOV2_GATED if gated else HF_DINOV2
    config = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        **_vit_config(backbone, state),
        "mlp_ratio": 4 if gated else inner // width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "use_swiglu_ffn": gated,
        **({"num_register_tokens": state["reg_token"].shape[1]} if registers else {}),
    }
    return config, {**layout.export(state), "embeddings.mask_token": torch.zeros(1, width)}


def _dinov3(backbone: TimmBackbone, state: State) -> tuple[dict[str, object], dict[str, Tensor]]:
    biased = "blocks.0.attn.q_bias" in state
    gated = "blocks.0.mlp.fc1_g.weight" in state
    config = {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        **_vit_config(backbone, state),
        "intermediate_size": state["blocks.0.mlp.fc2.weight"].shape[1],
        "num_register_tokens": state["reg_token"].shape[1],
        "query_bias": biased,
        "key_bias": False,
        "value_bias": biased,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "rope_theta": 100.0,
    }
    return config, {**HF_DINOV3.export(state), "embeddings.mask_token": torch.zeros(1, 1, backbone.num_features)}


def _folder_of(backbone: Backbone) -> tuple[dict[str, object], dict[str, Tensor]]:
    """(configuration, tensors) of a backbone.

    Raises:
        ValueError: transformers has no network of this kind.
    """
    if isinstance(backbone, ResNet):
        return _resnet(backbone)
    if isinstance(backbone, TimmBackbone):
        state, kind = backbone.network.state_dict(), type(backbone.network).__name__
        if kind == "ConvNeXt" and "stages.0.blocks.0.gamma" in state:
            return _convnext(backbone.network, state)
        if kind == "VisionTransformer" and "pos_embed" in state and "cls_token" in state:
            return (_dinov2 if "blocks.0.ls1.gamma" in state else _vit)(backbone, state)
        if kind == "Eva" and "_dinov3" in backbone.arch:
            return _dinov3(backbone, state)
    raise ValueError(
        f"layout='transformers' has no network like {backbone.arch}, only ResNet, ViT, DINOv2, DINOv3 and ConvNeXt; export "
        "with layout timm, onnx or torch_export"
    )


def features_in_transformers(backbone: Backbone) -> str:
    """Python code that takes the features from the output of the exported network."""
    network = backbone.network if isinstance(backbone, TimmBackbone) else None
    averages = getattr(network, "global_pool", None) == "avg" and hasattr(network, "blocks")
    if backbone.traits.pool == "mean" or (backbone.traits.pool == "own" and averages):
        return f"output.last_hidden_state[:, {getattr(network, 'num_prefix_tokens', 1)}:].mean(1)"
    if backbone.traits.pool == "cls":
        return "output.last_hidden_state[:, 0]"
    return "output.pooler_output.flatten(1)"


def write_transformers(backbone: Backbone, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``.

    Raises:
        ValueError: transformers has no such network.
        OSError: a file could not be written.
    """
    from safetensors.torch import save

    config, tensors = _folder_of(backbone)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    for name, content in (
        ("preprocessor_config.json", transformers_preprocessor(backbone)),
        ("config.json", {**config, "dtype": "float32"}),
    ):
        write_whole(folder / name, (json.dumps(content, indent=1) + "\n").encode())
