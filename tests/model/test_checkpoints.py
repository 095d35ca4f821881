"""Checkpoints of every known layout load by name and shape; everything else is refused with what is wrong."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastuft.model import MoCo, build_backbone, export, export_backbone, export_state_dict, load_backbone, load_init


@pytest.fixture
def moco():
    torch.manual_seed(0)
    return MoCo(build_backbone("resnet18"), 16)


@pytest.fixture
def donor():
    torch.manual_seed(1)
    return MoCo(build_backbone("resnet18"), 16).query_encoder


def equal(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def mocov2(donor) -> dict:
    state = {f"module.encoder_q.{name}": value for name, value in donor.backbone.state_dict().items()}
    state |= {f"module.encoder_q.fc.{name}": value for name, value in donor.head.state_dict().items()}
    state |= {name.replace("encoder_q", "encoder_k"): torch.randn_like(value.float()) for name, value in state.items()}
    return {"epoch": 800, "arch": "resnet18", "state_dict": state | {"module.queue": torch.randn(16, 32)}}


def test_official_mocov2_layout_with_head(moco, donor, tmp_path):
    torch.save(mocov2(donor), tmp_path / "moco.pth.tar")
    report = load_init(moco, tmp_path / "moco.pth.tar")
    assert equal(moco.query_encoder, donor) and equal(moco.key_encoder, donor)
    assert report.head_loaded and "module.encoder_q." in report.layout
    assert not report.missing
    assert "state_dict.module.queue" in report.ignored
    assert f"{len(report.matched)} tensors matched" in str(report)


def test_mocov1_head_is_replaced_by_a_fresh_one(moco, donor, tmp_path):
    content = mocov2(donor)
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if ".fc." not in k}
    content["state_dict"]["module.encoder_q.fc.weight"] = torch.randn(16, 512)
    content["state_dict"]["module.encoder_q.fc.bias"] = torch.randn(16)
    torch.save(content, tmp_path / "moco.pth")
    report = load_init(moco, tmp_path / "moco.pth")
    assert not report.head_loaded and "fresh head" in str(report)
    assert equal(moco.query_encoder.backbone, donor.backbone)


@pytest.mark.parametrize("prefix", ["", "backbone.", "model.encoder.net."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_plain_backbones_under_any_prefix(moco, donor, tmp_path, prefix, suffix):
    state = {prefix + name: value for name, value in donor.backbone.state_dict().items()}
    state |= {f"{prefix}fc.weight": torch.randn(1000, 512), f"{prefix}fc.bias": torch.randn(1000)}
    path = tmp_path / f"x{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    report = load_init(moco, path)
    assert equal(moco.query_encoder.backbone, donor.backbone)
    assert not report.head_loaded


def test_format_is_told_from_content_not_from_the_name(moco, donor, tmp_path):
    save_file(donor.backbone.state_dict(), tmp_path / "wrong.pth")
    load_init(moco, tmp_path / "wrong.pth")
    assert equal(moco.query_encoder.backbone, donor.backbone)


def test_lightly_sequential_numbering_with_projection_head(moco, donor, tmp_path):
    names = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    state = {}
    for name, value in donor.backbone.state_dict().items():
        first, _, rest = name.partition(".")
        state[f"backbone.{names[first]}.{rest}"] = value
    state |= {f"projection_head.layers.{name}": value for name, value in donor.head.state_dict().items()}
    momentum = {"backbone.": "backbone_momentum.", "projection_head.": "projection_head_momentum."}
    for name, value in list(state.items()):
        first = name.partition(".")[0] + "."
        state[name.replace(first, momentum[first], 1)] = torch.zeros_like(value)
    torch.save({"state_dict": state}, tmp_path / "lightly.ckpt")
    report = load_init(moco, tmp_path / "lightly.ckpt")
    assert equal(moco.query_encoder, donor)
    assert report.layout.startswith("sequential") and report.head_loaded


def test_missing_counters_are_fine_and_missing_weights_are_listed(moco, donor, tmp_path):
    state = {k: v for k, v in donor.backbone.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "a.pth")
    assert all(name.endswith("num_batches_tracked") for name in load_init(moco, tmp_path / "a.pth").missing)
    del state["layer4.1.bn2.weight"]
    torch.save(state, tmp_path / "b.pth")
    before = {name: value.clone() for name, value in moco.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 of 120 backbone tensors .*layer4\.1\.bn2\.weight.*--allow_missing"):
        load_init(moco, tmp_path / "b.pth")
    assert all(torch.equal(value, before[name]) for name, value in moco.state_dict().items())
    report = load_init(moco, tmp_path / "b.pth", allow_missing=["layer4.1.bn2.*"])
    assert "layer4.1.bn2.weight" in report.missing


def test_other_shapes_are_listed(moco, tmp_path):
    torch.save(build_backbone("resnet18", "small").state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"conv1\.weight \(file \(64, 3, 3, 3\), network \(64, 3, 7, 7\)\)"):
        load_init(moco, tmp_path / "small.pth")
    report = load_init(moco, tmp_path / "small.pth", allow_missing=["conv1.weight"])
    assert "conv1.weight" in report.missing and "conv1.weight" not in report.matched


def test_other_network_is_refused(moco, tmp_path):
    torch.save(build_backbone("resnet_tiny", "small").state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"Choose the model\.arch"):
        load_init(moco, tmp_path / "tiny.pth")


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


@pytest.mark.parametrize(
    "content", [pickle.dumps({"state_dict": Bomb()}), b"<html>not found</html> and more", b"", b"short"]
)
def test_pickles_and_junk_are_refused_and_run_nothing(moco, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match="init="):
        load_init(moco, tmp_path / "x.pth")
    assert not (tmp_path / "exploded").exists()


def test_torch_archive_with_code_is_refused(moco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"Nothing in a checkpoint is executed"):
        load_init(moco, tmp_path / "x.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "is not a file"),
        (lambda p: p.mkdir(), "is a folder without checkpoints"),
        (lambda p: torch.save({"epoch": 3}, p), "holds no tensors"),
        (lambda p: p.write_bytes((100).to_bytes(8, "little") + b"{" + b"x" * 200), "damaged safetensors"),
    ],
)
def test_unusable_files_are_named(moco, tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        load_init(moco, tmp_path / "x")


def bit_archive(backbone) -> dict:
    """The backbone under the names of BiT's published archives, kernels as HWIO."""
    arrays = {}
    for name, value in backbone.state_dict().items():
        array = value.numpy()
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        if name == "conv1.weight":
            key = "root_block/standardized_conv2d/kernel"
        elif name.startswith("norm."):
            key = f"group_norm/{'gamma' if name.endswith('weight') else 'beta'}"
        else:
            layer, unit, part, *rest = name.split(".")
            path = f"block{layer[5:]}/unit{int(unit) + 1:02d}"
            if part == "downsample":
                key = f"{path}/a/proj/standardized_conv2d/kernel"
            elif part.startswith("conv"):
                key = f"{path}/{'abc'[int(part[4:]) - 1]}/standardized_conv2d/kernel"
            else:
                kind = "gamma" if rest == ["weight"] else "beta"
                key = f"{path}/{'abc'[int(part[2:]) - 1]}/group_norm/{kind}"
        arrays[f"resnet/{key}"] = array
    return arrays | {"resnet/head/conv2d/kernel": np.zeros((1, 1, 256, 7), np.float32)}


def test_bit_archives_load_without_pickle(tmp_path):
    torch.manual_seed(3)
    donor = build_backbone("bit_resnet_tiny", "small")
    np.savez(tmp_path / "bit.npz", **bit_archive(donor))
    moco = MoCo(build_backbone("bit_resnet_tiny", "small"), 16)
    report = load_init(moco, tmp_path / "bit.npz")
    assert equal(moco.query_encoder.backbone, donor) and report.layout.startswith("BiT npz")
    assert report.ignored == ["resnet/head/conv2d/kernel"]
    np.savez(tmp_path / "object.npz", x=np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError):
        load_init(moco, tmp_path / "object.npz")


def test_exported_backbone_says_what_it_is(tmp_path):
    backbone = build_backbone("bit_resnet_tiny", "small")
    export_backbone(backbone, tmp_path / "run" / "backbone.safetensors")
    for place in (tmp_path / "run", tmp_path / "run" / "backbone.safetensors"):
        loaded = load_backbone(place)
        assert equal(loaded, backbone) and not loaded.training
        assert (loaded.arch, loaded.stem, loaded.mean) == ("bit_resnet_tiny", "small", (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="arch='resnet18' contradicts"):
        load_backbone(tmp_path / "run", arch="resnet18")


def test_backbone_without_metadata_needs_its_network_named(tmp_path):
    backbone = build_backbone("resnet18")
    torch.save(backbone.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="arch is not told by"):
        load_backbone(tmp_path / "x.pth")
    assert equal(load_backbone(tmp_path / "x.pth", arch="resnet18"), backbone)


def test_export_reads_back_under_each_layout(tmp_path):
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
        ({"layout": "torchvision", "out": "x.onnx"}, "unknown suffix"),
        ({"out": "x.pth"}, "needs the suffix .safetensors"),
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
def test_exports_have_the_tensors_of_the_other_librarys_network(arch, layout):
    with torch.device("meta"):
        backbone = build_backbone(arch)
    backbone = backbone.to_empty(device="cpu")
    bare, full = {**RESNETS, **TIMM_BIT}[arch]
    assert fingerprint(export_state_dict(backbone, layout)) == bare
    assert fingerprint(export_state_dict(backbone, layout, num_classes=1000)) == full


def their_network(arch, layout, num_classes):
    """The other library's network."""
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


def test_the_checkpoint_of_lightlys_example_loads_with_its_head(tmp_path):
    modules = pytest.importorskip("lightly.models.modules")
    torchvision = pytest.importorskip("torchvision")

    class Example(nn.Module):  # as in lightly's examples/pytorch/moco.py
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
            self.projection_head = modules.MoCoProjectionHead(512, 512, 16)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)

    theirs = Example().eval()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "lightly.ckpt")
    ours = MoCo(build_backbone("resnet18"), 16)
    assert load_init(ours, tmp_path / "lightly.ckpt").head_loaded
    images = torch.randn(2, 3, 64, 64)
    expected = theirs.projection_head(theirs.backbone(images).flatten(1))
    torch.testing.assert_close(ours.query_encoder.eval()(images), expected)


def test_half_precision_weights_are_taken_in_full(moco, donor, tmp_path):
    save_file(
        {n: v.half() if v.is_floating_point() else v for n, v in donor.backbone.state_dict().items()}, tmp_path / "x"
    )
    load_init(moco, tmp_path / "x")
    assert all(p.dtype == torch.float32 for p in moco.parameters())
    torch.testing.assert_close(moco.query_encoder.backbone.conv1.weight, donor.backbone.conv1.weight.half().float())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_export_that_the_disk_refuses_leaves_the_older_file(tmp_path, monkeypatch, suffix):
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
