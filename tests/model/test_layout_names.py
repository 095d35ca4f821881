"""Every layout reads back the names that it writes, with equal values and under any prefix."""

from __future__ import annotations

import pytest
import torch

from fastuft.model import build_backbone
from fastuft.model.checkpoint import resnet_layouts, transformer_layouts
from fastuft.model.checkpoint.matching import find_matches

WIDTH = 4


def block(*parts: str) -> dict[str, torch.Tensor]:
    return {f"blocks.{i}.{part}": torch.randn(WIDTH) for i in (0, 1, 11) for part in parts}


def attention(i: int, *, bias: bool = True) -> dict[str, torch.Tensor]:
    found = {f"blocks.{i}.attn.qkv.weight": torch.randn(3 * WIDTH, WIDTH)}
    return {**found, f"blocks.{i}.attn.qkv.bias": torch.randn(3 * WIDTH)} if bias else found


def vit(*parts: str, bias: bool = True) -> dict[str, torch.Tensor]:
    state = {"cls_token": torch.randn(1, 1, WIDTH), "patch_embed.proj.weight": torch.randn(WIDTH, 3, 2, 2)}
    state |= {f"{name}.{kind}": torch.randn(WIDTH) for name in ("norm",) for kind in ("weight", "bias")}
    for i in (0, 1, 11):
        state |= attention(i, bias=bias)
    common = [f"{name}.{kind}" for name in ("norm1", "norm2", "attn.proj", "mlp.fc2") for kind in ("weight", "bias")]
    return state | block(*common, *parts)


POSITIONS = {"pos_embed": torch.randn(1, 5, WIDTH)}
PATCHES = {"pos_embed": torch.randn(1, 4, WIDTH), "reg_token": torch.randn(1, 4, WIDTH)}
MLP = ("mlp.fc1.weight", "mlp.fc1.bias")
SCALES = ("ls1.gamma", "ls2.gamma")
CONVNEXT = {
    **{f"stem.{i}.{kind}": torch.randn(WIDTH) for i in (0, 1) for kind in ("weight", "bias")},
    **{f"stages.1.downsample.{i}.{kind}": torch.randn(WIDTH) for i in (0, 1) for kind in ("weight", "bias")},
    **{f"stages.{s}.blocks.{b}.gamma": torch.randn(WIDTH) for s in (0, 1) for b in (0, 2)},
    **{f"stages.{s}.blocks.0.conv_dw.weight": torch.randn(WIDTH, 1, 7, 7) for s in (0, 1)},
    **{f"stages.{s}.blocks.0.mlp.fc{i}.weight": torch.randn(WIDTH, WIDTH, 1, 1) for s in (0, 1) for i in (1, 2)},
    "head.norm.weight": torch.randn(WIDTH),
}
STATES = {
    "HF_VIT": vit(*MLP) | POSITIONS,
    "HF_DINOV2": vit(*MLP, *SCALES) | POSITIONS,
    "HF_DINOV2_GATED": vit(*MLP, *SCALES) | POSITIONS,
    "HF_DINOV2_REGISTERS": vit(*MLP, *SCALES) | PATCHES,
    "HF_DINOV3": vit(*MLP, "gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias", bias=False)
    | {"reg_token": torch.ones(1, 4, 4)},
    "DINOV2": vit(*MLP, *SCALES) | POSITIONS,
    "DINOV2_GATED": vit(*MLP, *SCALES) | POSITIONS,
    "DINOV2_REGISTERS": vit(*MLP, *SCALES) | PATCHES,
    "CONVNEXT": CONVNEXT,
    "HF_CONVNEXT": CONVNEXT,
    "HF_DINOV3_CONVNEXT": CONVNEXT,
    "SEQUENTIAL": build_backbone("resnet18").state_dict(),
    "DETECTRON2": build_backbone("resnet18").state_dict(),
    "TRANSFORMERS_RESNET": build_backbone("resnet18").state_dict(),
    "TIMM_V2": build_backbone("bit_resnet_tiny", "small").state_dict(),
}


@pytest.mark.parametrize("prefix", ["", "model.backbone."])
@pytest.mark.parametrize("name", STATES)
def test_layouts_round_trip(name, prefix):
    layout = getattr(transformer_layouts, name, None) or getattr(resnet_layouts, name)
    state = STATES[name]
    written = {prefix + key: value for key, value in layout.export(state).items()}
    best = find_matches(written, state)[0]
    assert best.prefix == prefix and best.is_whole(state)
    assert all(torch.equal(value, state[key]) for key, value in best.values.items())
    assert name.startswith("DINOV2") or set(written) != {prefix + key for key in state}


def test_a_tensor_missing_from_a_layout_is_named():
    with pytest.raises(ValueError, match=r"layout transformers ViT has no tensor for blocks\.0\.ls1\.gamma"):
        transformer_layouts.HF_VIT.export({"blocks.0.ls1.gamma": torch.ones(4)})


def test_blocks_numbered_in_chunks_are_found():
    state = STATES["DINOV2"]
    chunked = {f"teacher.backbone.{k.replace('blocks.', 'blocks.0.')}": v for k, v in state.items()}
    best = find_matches(chunked, state)[0]
    assert best.is_whole(state) and best.prefix == "teacher.backbone."


def test_the_joint_bias_of_dinov3_is_split():
    state = {"blocks.0.attn.q_bias": torch.ones(4), "blocks.0.attn.v_bias": torch.full((4,), 3.0)}
    joint = {"blocks.0.attn.qkv.bias": torch.tensor([1.0] * 4 + [2.0] * 4 + [3.0] * 4)}
    best = find_matches(joint, state)[0]
    assert all(torch.equal(best.values[name], value) for name, value in state.items())
