"""Checkpoints of every known layout load by name and shape; what would compute something else is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from same_weights import equal
from torch import nn

from fastuft.model import MoCo, build_backbone, load_init


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
    assert report.ignored == ("resnet/head/conv2d/kernel",)


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
