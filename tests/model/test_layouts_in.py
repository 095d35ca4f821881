"""Checkpoints of every known layout load by name and shape; those that would compute something else are refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from same_weights import equal
from torch import nn

from fastuft.model import MoCo, build_backbone, export_backbone, export_state_dict, load_backbone, load_init


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


def test_a_mocov1_head_is_replaced_by_a_new_one(moco, donor, tmp_path):
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


def test_the_format_is_detected_from_content_not_from_the_file_name(moco, donor, tmp_path):
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


def test_missing_counters_are_allowed_and_missing_weights_listed(moco, donor, tmp_path):
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


def test_mismatched_shapes_are_listed(moco, tmp_path):
    torch.save(build_backbone("resnet18", "small").state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"conv1\.weight \(file \(64, 3, 3, 3\), network \(64, 3, 7, 7\)\)"):
        load_init(moco, tmp_path / "small.pth")
    report = load_init(moco, tmp_path / "small.pth", allow_missing=["conv1.weight"])
    assert "conv1.weight" in report.missing and "conv1.weight" not in report.matched


def test_weights_of_another_network_are_refused(moco, tmp_path):
    torch.save(build_backbone("resnet_tiny", "small").state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"Choose the model\.arch and model\.stem.*PATTERN\.$"):
        load_init(moco, tmp_path / "tiny.pth")
    export_backbone(build_backbone("resnet_tiny", "small"), tmp_path / "named.safetensors")
    with pytest.raises(
        ValueError, match=r"PATTERN\. It names 'resnet_tiny' as its network, and this one is 'resnet18'$"
    ):
        load_init(moco, tmp_path / "named.safetensors")


def bit_archive(backbone) -> dict:
    """The backbone under the names of BiT's published archives, with kernels as HWIO."""
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


def test_a_checkpoint_from_the_lightly_example_loads_with_its_head(tmp_path):
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


def test_half_precision_weights_are_converted_to_float32(moco, donor, tmp_path):
    save_file(
        {n: v.half() if v.is_floating_point() else v for n, v in donor.backbone.state_dict().items()}, tmp_path / "x"
    )
    load_init(moco, tmp_path / "x")
    assert all(p.dtype == torch.float32 for p in moco.parameters())
    torch.testing.assert_close(moco.query_encoder.backbone.conv1.weight, donor.backbone.conv1.weight.half().float())


def test_a_file_with_two_backbones_loads_by_init_key(moco, donor, tmp_path):
    torch.manual_seed(2)
    momentum = MoCo(build_backbone("resnet18"), 16).query_encoder
    state = {f"module.encoder_q.{name}": value for name, value in donor.backbone.state_dict().items()}
    state |= {f"module.encoder_k.{name}": value for name, value in momentum.backbone.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "moco.pth")
    report = load_init(moco, tmp_path / "moco.pth")
    assert equal(moco.query_encoder.backbone, donor.backbone)
    assert report.others == ("state_dict.module.encoder_k",) and "--init_key" in str(report)
    for key in ("encoder_k", "module.encoder_k", "state_dict.module.encoder_k."):
        report = load_init(moco, tmp_path / "moco.pth", key=key)
        assert equal(moco.query_encoder.backbone, momentum.backbone) and not report.others
    with pytest.raises(ValueError, match=r"init_key='encoder' is not a backbone.*module\.encoder_q, state_dict"):
        load_init(moco, tmp_path / "moco.pth", key="encoder")


def test_a_deeper_network_is_not_truncated(tmp_path):
    deep = build_backbone("resnet34").state_dict()
    torch.save(deep, tmp_path / "resnet34.pth")
    with pytest.raises(ValueError, match=r"has a larger network than resnet18: 48 more tensors.*layer1\.2\.conv1"):
        load_init(build_backbone("resnet18"), tmp_path / "resnet34.pth")


def test_a_bias_that_the_network_lacks_is_refused_unless_zero(tmp_path):
    state = build_backbone("resnet_tiny", "small").state_dict()
    torch.save({**state, "conv1.bias": torch.zeros(16)}, tmp_path / "zero.pth")
    load_init(build_backbone("resnet_tiny", "small"), tmp_path / "zero.pth")
    torch.save({**state, "conv1.bias": torch.ones(16)}, tmp_path / "one.pth")
    with pytest.raises(ValueError, match=r"more tensors of such layers, conv1\.bias"):
        load_init(build_backbone("resnet_tiny", "small"), tmp_path / "one.pth")


@pytest.mark.parametrize("channels", ["bgr", "gray"])
def test_first_convolutions_with_other_channels_are_converted_on_request(tmp_path, channels):
    ours = build_backbone("resnet_tiny", "small").eval()
    state = ours.state_dict()
    images = torch.randn(2, 1 if channels == "gray" else 3, 32, 32)
    weight = torch.randn(16, images.shape[1], 3, 3)
    torch.save({**state, "conv1.weight": weight}, tmp_path / "x.pth")
    theirs = torch.nn.functional.conv2d(images, weight, stride=2, padding=1)
    if channels == "gray":
        with pytest.raises(ValueError, match=r"takes gray images; --init_channels gray"):
            load_init(ours, tmp_path / "x.pth")
    load_init(ours, tmp_path / "x.pth", channels=channels)
    rgb = images.expand(-1, 3, -1, -1) if channels == "gray" else images.flip(1)
    torch.testing.assert_close(ours.conv1(rgb), theirs)
    with pytest.raises(ValueError, match=r"init_channels='cmyk' is not allowed"):
        load_init(ours, tmp_path / "x.pth", channels="cmyk")


def test_gray_conversion_needs_a_one_channel_convolution(moco, donor, tmp_path):
    torch.save(donor.backbone.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"init_channels='gray' needs a first convolution with 1 channel,"):
        load_init(moco, tmp_path / "x.pth", channels="gray")


class CaffeBottleneck(nn.Module):
    """detectron2's bottleneck, with its names and the stride in the first convolution."""

    def __init__(self, inputs, planes, stride):
        super().__init__()
        self.conv1 = self.conv(inputs, planes, 1, stride)
        self.conv2 = self.conv(planes, planes, 3, 1)
        self.conv3 = self.conv(planes, planes * 4, 1, 1)
        self.shortcut = self.conv(inputs, planes * 4, 1, stride) if inputs != planes * 4 or stride != 1 else None

    @staticmethod
    def conv(inputs, outputs, side, stride):
        conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
        conv.norm = nn.BatchNorm2d(outputs)
        conv.norm.weight.data.uniform_(0.2, 0.4)
        conv.norm.bias.data.normal_(0, 0.1)
        return conv

    def forward(self, x):
        shortcut = x if self.shortcut is None else self.shortcut.norm(self.shortcut(x))
        y = self.conv1.norm(self.conv1(x)).relu()
        y = self.conv2.norm(self.conv2(y)).relu()
        return (self.conv3.norm(self.conv3(y)) + shortcut).relu()


class Detectron2(nn.Module):
    """detectron2's ResNet-50, for BGR pixels in 0..255 minus their mean."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = CaffeBottleneck.conv(3, 64, 7, 2)
        inputs = 64
        for stage, (depth, planes) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)):
            blocks = []
            for index in range(depth):
                blocks.append(CaffeBottleneck(inputs, planes, 2 if stage and not index else 1))
                inputs = planes * 4
            self.add_module(f"res{stage + 2}", nn.Sequential(*blocks))

    def forward(self, pixels, std=(1.0, 1.0, 1.0)):
        mean = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
        x = (pixels - mean) / torch.tensor(std).view(3, 1, 1)
        x = nn.functional.max_pool2d(self.stem.conv1.norm(self.stem.conv1(x)).relu(), 3, 2, 1)
        for stage in (2, 3, 4, 5):
            x = self.get_submodule(f"res{stage}")(x)
        return x.mean((2, 3))


@pytest.mark.parametrize("configured", [False, True])
def test_detectron2_pixels_and_strides_are_converted(tmp_path, configured):
    torch.manual_seed(4)
    theirs = Detectron2().eval()
    std = (57.375, 57.12, 58.395) if configured else (1.0, 1.0, 1.0)
    theirs.stem.conv1.weight.data *= sum(std) / 3 / 60
    state = {f"backbone.bottom_up.{name}": v for name, v in theirs.state_dict().items() if "num_batches" not in name}
    torch.save({"model": state, "iteration": 5}, tmp_path / "model_final.pth")
    if configured:
        (tmp_path / "config.yaml").write_text(f"MODEL: {{PIXEL_STD: {list(std)}}}\nINPUT: {{FORMAT: BGR}}\n")
    ours = build_backbone("resnet50").eval()
    report = load_init(ours, tmp_path / "model_final.pth")
    assert report.layout.startswith("detectron2 ResNet") and report.traits["stride_in_1x1"]
    pixels = torch.randint(0, 256, (2, 3, 64, 64)).float()
    rgb = pixels.flip(1) / 255
    normalized = (rgb - torch.tensor(ours.mean).view(3, 1, 1)) / torch.tensor(ours.std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(ours(normalized), theirs(pixels, std), rtol=1e-4, atol=1e-5)
    export_backbone(ours, tmp_path / "ours.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(tmp_path / "ours.safetensors")(normalized), ours(normalized))
    with pytest.raises(ValueError, match="has no ResNet with the stride in 1x1 convolutions"):
        export_state_dict(ours, "torchvision")


def test_other_detectron2_means_are_refused(tmp_path):
    state = {f"backbone.bottom_up.{name}": value for name, value in Detectron2().state_dict().items()}
    torch.save({"model": state}, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text("MODEL: {PIXEL_MEAN: [127.5, 127.5, 127.5]}\n")
    with pytest.raises(ValueError, match="is not ImageNet's"):
        load_init(build_backbone("resnet50"), tmp_path / "model_final.pth")


def test_mmpretrain_checkpoints_load_by_prefix(moco, donor, tmp_path):
    state = {f"backbone.{name}": value for name, value in donor.backbone.state_dict().items()}
    torch.save(
        {"meta": {"epoch": 100}, "state_dict": {**state, "head.fc.weight": torch.ones(2, 512)}}, tmp_path / "x.pth"
    )
    load_init(moco, tmp_path / "x.pth")
    assert equal(moco.query_encoder.backbone, donor.backbone)
