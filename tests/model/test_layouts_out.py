"""Exports load again here and in other libraries."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from same_weights import equal
from torch import nn

from fastuft.model import build_backbone, export, export_backbone, export_state_dict, load_backbone, load_init


def test_an_exported_backbone_records_its_network_and_preprocessing(tmp_path):
    backbone = build_backbone("bit_resnet_tiny", "small")
    export_backbone(backbone, tmp_path / "run" / "backbone.safetensors")
    for path in (tmp_path / "run", tmp_path / "run" / "backbone.safetensors"):
        loaded = load_backbone(path)
        assert equal(loaded, backbone) and not loaded.training
        assert (loaded.arch, loaded.stem, loaded.mean) == ("bit_resnet_tiny", "small", (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="arch='resnet18' contradicts"):
        load_backbone(tmp_path / "run", arch="resnet18")


def test_a_backbone_without_metadata_needs_a_network_name(tmp_path):
    backbone = build_backbone("resnet18")
    torch.save(backbone.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="does not name its network"):
        load_backbone(tmp_path / "x.pth")
    assert equal(load_backbone(tmp_path / "x.pth", arch="resnet18"), backbone)


def test_exports_load_again_in_every_layout(tmp_path):
    backbone = build_backbone("resnet18")
    export_backbone(backbone, tmp_path / "b.safetensors")
    export(tmp_path / "b.safetensors", tmp_path / "tv.pth", layout="torchvision", num_classes=10)
    state = torch.load(tmp_path / "tv.pth", weights_only=True)
    assert state["fc.weight"].shape == (10, 512)
    assert {k for k in state if not k.startswith("fc.")} == set(backbone.state_dict())
    export(tmp_path / "b.safetensors", tmp_path / "timm.safetensors", layout="timm")
    assert set(load_file(tmp_path / "timm.safetensors")) == set(backbone.state_dict())
    export(tmp_path / "b.safetensors", tmp_path / "again.safetensors")
    assert equal(load_backbone(tmp_path / "again.safetensors"), backbone)


def test_export_of_resnet_v2_round_trips_through_timms_names(tmp_path):
    donor = build_backbone("bit_resnet_tiny", "small")
    state = export_state_dict(donor, "timm", num_classes=5)
    assert state["head.fc.weight"].shape == (5, 256, 1, 1)
    save_file(state, tmp_path / "timm.safetensors")
    other = build_backbone("bit_resnet_tiny", "small")
    assert load_init(other, tmp_path / "timm.safetensors").layout.startswith("timm ResNet-v2")
    assert equal(other, donor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "keras"}, "layout='keras' is not allowed"),
        ({"layout": "torchvision", "out": "x.onnx"}, "wrong suffix"),
        ({"out": "x.pth"}, "wrong suffix for layout fastuft; use .safetensors"),
    ],
)
def test_impossible_exports_are_refused(tmp_path, arguments, message):
    export_backbone(build_backbone("resnet_tiny", "small"), tmp_path / "b.safetensors")
    out = tmp_path / arguments.pop("out", "x.pth")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "b.safetensors", out, **arguments)


def fingerprint(state: dict) -> str:
    lines = [f"{name} {tuple(value.shape)}" for name, value in sorted(state.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# Of the networks of torchvision 0.28 and timm 1.0.31, without classifier and with one of 1000 classes: sorted
# "name shape" lines. Both libraries name a ResNet's tensors alike.
RESNETS = {
    "resnet18": ("504739f3083bec5e", "5191d63ec3989592"),
    "resnet34": ("44a0fd3c2ef0c9ed", "f8de2a1812ef85e4"),
    "resnet50": ("c1f7fd3808aa49e7", "a87e91cd6bd1f939"),
    "resnet101": ("a36254db3e8fffb4", "dbc3ca74fffafc72"),
}


TIMM_BIT = {
    "bit_resnet50": ("2a0bb1f7fd172490", "131dbffdd8874231"),
    "bit_resnet101": ("de79196896d7c975", "bc4eb2116817a373"),
}


LAYOUTS = [(arch, "torchvision") for arch in RESNETS] + [(arch, "timm") for arch in (*RESNETS, *TIMM_BIT)]


@pytest.mark.parametrize(("arch", "layout"), LAYOUTS)
def test_exports_have_the_tensors_of_the_peer_network(arch, layout):
    with torch.device("meta"):
        backbone = build_backbone(arch)
    backbone = backbone.to_empty(device="cpu")
    bare, full = {**RESNETS, **TIMM_BIT}[arch]
    assert fingerprint(export_state_dict(backbone, layout)) == bare
    assert fingerprint(export_state_dict(backbone, layout, num_classes=1000)) == full


def their_network(arch, layout, num_classes):
    """The network of the other library."""
    if layout == "timm":
        timm = pytest.importorskip("timm")
        names = {"bit_resnet50": "resnetv2_50x1_bit", "bit_resnet101": "resnetv2_101x1_bit"}
        return timm.create_model(names.get(arch, arch), num_classes=num_classes)
    network = getattr(pytest.importorskip("torchvision").models, arch)(weights=None)
    if not num_classes:
        network.fc = nn.Identity()
    return network


@pytest.mark.parametrize("num_classes", [0, 1000])
@pytest.mark.parametrize(("arch", "layout"), LAYOUTS)
def test_exports_load_strictly_in_torchvision_and_timm(tmp_path, arch, layout, num_classes):
    network = their_network(arch, layout, num_classes)
    torch.manual_seed(2)
    backbone = build_backbone(arch)
    export_backbone(backbone, tmp_path / "b.safetensors")
    export(tmp_path / "b.safetensors", tmp_path / "x.pth", layout=layout, num_classes=num_classes)
    network.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True), strict=True)
    if not num_classes:
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(network.eval()(images), backbone.eval()(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_failed_export_keeps_the_older_file(tmp_path, monkeypatch, suffix):
    backbone = build_backbone("resnet_tiny", "small")
    export_backbone(backbone, tmp_path / "b.safetensors")
    out = tmp_path / f"out{suffix}"
    export(tmp_path / "b.safetensors", out, layout="torchvision")
    before = out.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        export(tmp_path / "b.safetensors", out, layout="torchvision", num_classes=3)
    assert out.read_bytes() == before and not list(tmp_path.glob("*.partial"))
