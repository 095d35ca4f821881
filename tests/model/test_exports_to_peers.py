"""Exports load in their target libraries without missing or unexpected tensors, and give equal features."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastuft.model import build_backbone, export, export_backbone
from fastuft.model.checkpoint.transformers_export import features_in_transformers

pytestmark = pytest.mark.peers

SMALL = {"depth": 2, "embed_dim": 192, "num_heads": 3}
# kind -> (arch, changes of timm's network, side of the images)
NETWORKS = {
    "resnet18": ("resnet18", {}, 64),
    "resnet50": ("resnet50", {}, 64),
    "vit": ("timm:vit_tiny_patch16_224", {"depth": 2}, 224),
    "vit that averages": ("timm:vit_tiny_patch16_224", {"depth": 2, "global_pool": "avg", "fc_norm": False}, 224),
    "dinov2": ("timm:vit_small_patch14_dinov2", {**SMALL, "img_size": 518}, 518),
    "dinov2 with gated MLP": (
        "timm:vit_giant_patch14_dinov2",
        {**SMALL, "mlp_ratio": 1024 / 192, "img_size": 518},
        518,
    ),
    "dinov2 with registers": ("timm:vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 518}, 518),
    "dinov3": ("timm:vit_small_patch16_dinov3", SMALL, 64),
    "dinov3 with biases": ("timm:vit_small_patch16_dinov3_qkvb", SMALL, 64),
    "dinov3 with gated MLP": ("timm:vit_small_plus_patch16_dinov3", SMALL, 64),
    "convnext": ("timm:convnext_atto", {}, 64),
}


def spread_(backbone):
    """Move weights away from their initial zeros and ones, so that a missing tensor is detected."""
    generator = torch.Generator().manual_seed(0)
    for name, value in backbone.state_dict().items():
        if value.is_floating_point() and value.ndim < 2:
            low = 0.5 if name.endswith(("weight", "var", "gamma", "gamma_1", "gamma_2")) else -0.2
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + low)
        elif name.endswith("token"):
            value.copy_(torch.randn(value.shape, generator=generator))
    return backbone.eval()


@pytest.fixture
def smaller(monkeypatch):
    """Make ``timm.create_model`` build small versions of the networks in the table."""

    def install(changes):
        if changes:
            timm = pytest.importorskip("timm")
            create = timm.create_model
            monkeypatch.setattr(timm, "create_model", lambda name, **given: create(name, **{**given, **changes}))

    return install


@torch.no_grad()
@pytest.mark.parametrize("kind", NETWORKS)
def test_from_pretrained_loads_every_tensor_and_reproduces_the_features(tmp_path, smaller, kind):
    transformers = pytest.importorskip("transformers")
    arch, changes, side = NETWORKS[kind]
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    smaller(changes)
    backbone = spread_(build_backbone(arch))
    export_backbone(backbone, tmp_path / "b.safetensors")
    export(tmp_path / "b.safetensors", tmp_path / "hf", layout="transformers")
    network, info = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    images = torch.randn(2, 3, side, side)
    output = network.eval()(images)
    features = eval(features_in_transformers(backbone), {"output": output})
    torch.testing.assert_close(features, backbone(images), rtol=1e-5, atol=1e-5)


def test_the_transformers_image_processor_reproduces_the_inputs(tmp_path):
    transformers = pytest.importorskip("transformers")
    image = pytest.importorskip("PIL.Image")
    backbone = build_backbone("resnet18")
    export_backbone(backbone, tmp_path / "b.safetensors")
    export(tmp_path / "b.safetensors", tmp_path / "hf", layout="transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    gray = image.fromarray(np.full((300, 400, 3), 128, np.uint8))
    inputs = processor(gray, return_tensors="pt")["pixel_values"]
    assert inputs.shape == (1, 3, 224, 224)
    expected = (128 / 255 - torch.tensor(backbone.mean)) / torch.tensor(backbone.std)
    torch.testing.assert_close(inputs[0, :, 100, 100], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "stem"),
    [("resnet_tiny", "small"), ("bit_resnet_tiny", "small"), ("timm:vit_tiny_patch16_224", "imagenet")],
)
def test_onnx_reproduces_the_features_for_any_batch_size(tmp_path, smaller, arch, stem):
    onnx, _, runtime = (pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
        smaller({"depth": 1})
    backbone = spread_(build_backbone(arch, stem))
    export_backbone(backbone, tmp_path / "b.safetensors")
    export(tmp_path / "b.safetensors", tmp_path / "x.onnx", layout="onnx")
    model = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(model)
    assert model.opset_import[0].version >= 18
    assert json.loads((tmp_path / "x.json").read_text())["arch"] == arch
    session = runtime.InferenceSession(tmp_path / "x.onnx")
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, backbone.input_size, backbone.input_size)
        (features,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), backbone(images), rtol=1e-4, atol=1e-4)
