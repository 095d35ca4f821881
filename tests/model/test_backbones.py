"""Networks: names and shapes of torchvision, stems, outputs, BatchNorm modes, the MoCo pair."""

from __future__ import annotations

import copy
import hashlib
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastuft.model import Backbone, MoCo, SplitBatchNorm2d, build_backbone, has_batchnorm, set_batchnorm_mode


def fingerprint(state: dict) -> str:
    lines = [f"{name} {tuple(value.shape)}" for name, value in sorted(state.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# Of torchvision's networks without fc: sorted "name shape" lines. Taken from torchvision 0.28.
TORCHVISION = {
    "resnet18": "504739f3083bec5e",
    "resnet34": "44a0fd3c2ef0c9ed",
    "resnet50": "c1f7fd3808aa49e7",
    "resnet101": "a36254db3e8fffb4",
}
PARAMETERS = {"resnet18": 11_176_512, "resnet34": 21_284_672, "resnet50": 23_508_032, "resnet101": 42_500_160}


@pytest.mark.parametrize("arch", TORCHVISION)
def test_state_dict_equals_torchvision(arch):
    backbone = build_backbone(arch)
    assert fingerprint(backbone.state_dict()) == TORCHVISION[arch]
    assert sum(p.numel() for p in backbone.parameters()) == PARAMETERS[arch]


@pytest.mark.parametrize("arch", TORCHVISION)
def test_outputs_equal_torchvision(arch):
    torchvision = pytest.importorskip("torchvision")
    theirs = getattr(torchvision.models, arch)(weights=None)
    theirs.fc = nn.Identity()
    ours = build_backbone(arch)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize(
    ("arch", "stem", "width"),
    [
        ("resnet18", "small", 512),
        ("resnet_tiny", "small", 64),
        ("bit_resnet_tiny", "small", 256),
        ("resnet50", "imagenet", 2048),
    ],
)
def test_forward_shape_and_backward(arch, stem, width):
    backbone = build_backbone(arch, stem)
    features = backbone(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, width) and backbone.num_features == width
    features.sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize(
    ("arch", "stem"), [("resnet_tiny", "small"), ("bit_resnet_tiny", "small"), ("resnet18", "imagenet")]
)
def test_every_network_is_a_backbone_with_its_attributes(arch, stem):
    backbone = build_backbone(arch, stem).eval()
    assert isinstance(backbone, Backbone)
    assert (backbone.arch, backbone.stem) == (arch, stem)
    assert backbone.input_size == (32 if stem == "small" else 224)
    images = torch.randn(2, 3, backbone.input_size, backbone.input_size)
    assert torch.equal(backbone(images), backbone.features(images))


def test_the_stem_follows_the_configuration_only():
    assert build_backbone("resnet18", "small").conv1.kernel_size == (3, 3)
    assert build_backbone("resnet18").conv1.kernel_size == (7, 7)


def test_the_tiny_network_has_the_size_of_the_demo():
    assert 70_000 < sum(p.numel() for p in build_backbone("resnet_tiny", "small").parameters()) < 100_000


def test_bit_has_no_batchnorm_and_its_own_mean_and_std():
    backbone = build_backbone("bit_resnet50")
    assert not has_batchnorm(backbone) and has_batchnorm(build_backbone("resnet18"))
    assert (backbone.mean, backbone.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert sum(p.numel() for p in backbone.parameters()) == 23_500_352


@pytest.mark.parametrize(
    ("arch", "stem", "message"),
    [
        ("resnet51", "imagenet", "model.arch='resnet51' is unknown; choose one of resnet18"),
        ("resnet18", "tiny", "model.stem='tiny' is not allowed"),
    ],
)
def test_unknown_networks_are_refused(arch, stem, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(arch, stem)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_missing_timm_is_named():
    with pytest.raises(ValueError, match="needs timm; pip install timm"):
        build_backbone("timm:resnet18")


def test_timm_networks_work():
    timm = pytest.importorskip("timm")
    backbone = build_backbone("timm:resnet18")
    assert backbone(torch.randn(2, 3, 64, 64)).shape == (2, 512)
    with pytest.raises(ValueError, match="timm has no model 'nonsense'"):
        build_backbone("timm:nonsense")
    bit = timm.create_model("resnetv2_50x1_bit", num_classes=0).eval()
    ours = build_backbone("bit_resnet50").eval()
    from fastuft.model import export_state_dict

    bit.load_state_dict(export_state_dict(ours, "timm"), strict=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), bit(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_split_batchnorm_equals_batchnorm_on_chunks(memory_format):
    torch.manual_seed(0)
    split = set_batchnorm_mode(nn.BatchNorm2d(5), "split", 4)
    with torch.no_grad():
        split.weight.uniform_(0.5, 2)
        split.bias.normal_()
    x = torch.randn(12, 5, 6, 7).to(memory_format=memory_format).requires_grad_()
    y = split(x)
    assert y.is_contiguous(memory_format=memory_format)
    chunks = [F.batch_norm(c, None, None, split.weight, split.bias, training=True) for c in x.split(4)]
    torch.testing.assert_close(y, torch.cat(chunks), rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad(torch.cat(chunks), [x, split.weight, split.bias], upstream)
    got = torch.autograd.grad(y, [x, split.weight, split.bias], upstream)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_split_batchnorm_running_statistics_average_the_groups():
    split = set_batchnorm_mode(nn.BatchNorm2d(3), "split", 4)
    x = torch.randn(8, 3, 5, 5) * 3 + 1
    split(x)
    means, variances = zip(*((c.mean((0, 2, 3)), c.var((0, 2, 3))) for c in x.split(4)), strict=True)
    torch.testing.assert_close(split.running_mean, 0.1 * torch.stack(means).mean(0))
    torch.testing.assert_close(split.running_var, 0.9 * torch.ones(3) + 0.1 * torch.stack(variances).mean(0))
    assert split.num_batches_tracked == 1


def test_split_batchnorm_on_half_precision_accumulates_in_fp32():
    split = set_batchnorm_mode(nn.BatchNorm2d(3), "split", 4)
    x = torch.randn(8, 3, 16, 16) + 30
    exact = torch.cat([F.batch_norm(c, None, None, training=True) for c in x.bfloat16().float().split(4)])
    got = split(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=2e-2, atol=2e-2)


def test_compiled_split_batchnorm_equals_eager(monkeypatch):
    x = torch.randn(8, 3, 5, 5) * 3 + 1
    weights = torch.randn(8, 3, 5, 5)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda value=compiling: value)
        split = set_batchnorm_mode(nn.BatchNorm2d(3), "split", 4)
        given = x.clone().requires_grad_()
        out = split(given)
        out.square().mul(weights).sum().backward()
        results.append((out, given.grad, split.weight.grad, split.bias.grad, split.running_mean, split.running_var))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-4)


def test_split_batchnorm_keeps_state_dict_keys_and_converts_back():
    backbone = build_backbone("resnet_tiny", "small")
    keys = list(backbone.state_dict())
    set_batchnorm_mode(backbone, "split", 4)
    assert list(backbone.state_dict()) == keys
    assert any(isinstance(m, SplitBatchNorm2d) for m in backbone.modules())
    x = torch.randn(8, 3, 16, 16)
    split_eval = backbone.eval()(x)
    set_batchnorm_mode(backbone, "plain")
    assert not any(isinstance(m, SplitBatchNorm2d) for m in backbone.modules())
    torch.testing.assert_close(backbone(x), split_eval)


def test_split_batchnorm_compiles_without_graph_breaks():
    split = set_batchnorm_mode(nn.BatchNorm2d(4), "split", 2)
    x = torch.randn(4, 4, 3, 3)
    torch.testing.assert_close(torch.compile(split, fullgraph=True, backend="aot_eager")(x), split(x))


def test_split_batchnorm_needs_divisible_batches():
    split = set_batchnorm_mode(nn.BatchNorm2d(4), "split", 3)
    with pytest.raises(ValueError, match="batch of 4 images does not divide into statistics groups of 3"):
        split(torch.randn(4, 4, 3, 3))


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: dropping and activation inside."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Whitening(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) - x


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Identity()], ids=repr)
def test_split_batchnorm_keeps_the_activation_inside_a_layer(act):
    torch.manual_seed(0)
    layer = BatchNormAct2d(5, act)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    network = nn.Sequential(copy.deepcopy(layer))
    keys = list(network.state_dict())
    (split,) = set_batchnorm_mode(network, "split", 4)
    assert isinstance(split, SplitBatchNorm2d) and split.group == 4 and list(network.state_dict()) == keys
    x, upstream = (torch.randn(12, 5, 6, 7) for _ in range(2))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = network(ours), torch.cat([layer(part) for part in theirs.split(4)])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(split.weight.grad, layer.weight.grad, rtol=1e-4, atol=1e-4)
    y = network.eval()(x)
    set_batchnorm_mode(network, "plain")
    assert type(network[0]) is BatchNormAct2d
    torch.testing.assert_close(network(x), y)


def test_synchronized_batchnorm_keeps_the_activation_inside_a_layer():
    network = nn.Sequential(nn.Conv2d(3, 5, 1), BatchNormAct2d(5, nn.SiLU()), nn.BatchNorm2d(5))
    x, before = torch.randn(4, 3, 6, 6), list(network.state_dict())
    expected = network.eval()(x)
    synchronized = set_batchnorm_mode(network, "sync")
    assert [isinstance(layer, nn.SyncBatchNorm) for layer in synchronized] == [False, True, True]
    assert list(synchronized.state_dict()) == before
    torch.testing.assert_close(synchronized.eval()(x), expected)


@pytest.mark.parametrize("mode", ["split", "sync"])
def test_other_kinds_of_batchnorm_are_refused_by_name(mode):
    network = nn.Sequential(nn.Conv2d(3, 5, 1), Whitening(5))
    with pytest.raises(
        ValueError, match=r"layers of type \S*\.Whitening, a BatchNorm2d with a rule .*set model\.bn to plain"
    ):
        set_batchnorm_mode(network, mode, 4)
    assert set_batchnorm_mode(network, "plain") is network


def test_unknown_batchnorm_mode_is_refused():
    with pytest.raises(ValueError, match=r"model\.bn='frozen' is not allowed"):
        set_batchnorm_mode(nn.BatchNorm2d(4), "frozen")


def test_the_key_encoder_is_the_moving_average():
    torch.manual_seed(0)
    moco = MoCo(build_backbone("resnet_tiny", "small"), 16)
    assert not any(p.requires_grad for p in moco.key_encoder.parameters())
    with torch.no_grad():
        for p in moco.query_encoder.parameters():
            p.add_(torch.randn_like(p))
    before = [p.clone() for p in moco.key_encoder.parameters()]
    moco.momentum_update_(0.99)
    for old, key, query in zip(before, moco.key_encoder.parameters(), moco.query_encoder.parameters(), strict=True):
        torch.testing.assert_close(key, 0.99 * old + 0.01 * query)
    moco.copy_query_to_key()
    for key, query in zip(
        moco.key_encoder.state_dict().values(), moco.query_encoder.state_dict().values(), strict=True
    ):
        assert torch.equal(key, query)
