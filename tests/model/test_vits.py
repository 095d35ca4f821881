"""Training with timm's ViTs, ConvNeXts and convolutional networks: sizes, pooling, drop path, recomputed activations."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastuft
from fastuft.config import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
    preset_options,
)
from fastuft.data import Batch
from fastuft.model import MoCo, Traits, build_backbone, export, export_backbone, load_backbone, set_batchnorm_mode
from fastuft.model.checkpoint.card import _use
from fastuft.trainer.distributed import Ranks
from fastuft.trainer.learner_setup import build_learner
from fastuft.trainer.step import train_step

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.peers

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
# kind -> (arch, changes of timm's network, side of the images, side of its patch)
VITS = {
    "vit": ("timm:vit_tiny_patch16_224", SMALL, 64, 16),
    "dinov2": ("timm:vit_small_patch14_dinov2", SMALL, 56, 14),
    "dinov2 with registers": ("timm:vit_small_patch14_reg4_dinov2", SMALL, 56, 14),
    "dinov3": ("timm:vit_small_patch16_dinov3", SMALL, 64, 16),
}
CONVOLUTIONAL = {
    "convnext": ("timm:convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 64, 1),
    "efficientnet": ("timm:efficientnet_lite0", {}, 64, 1),
    "timm's resnet18": ("timm:resnet18", {}, 64, 1),
    "resnet18": ("resnet18", {}, 64, 1),
}
NETWORKS = VITS | CONVOLUTIONAL
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def small(monkeypatch):
    """Make ``timm.create_model`` build a small version of a network; returns (arch, side, patch)."""

    def install(kind):
        arch, changes, side, patch = NETWORKS[kind]
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, **given: create(name, **{**given, **changes}))
        torch.manual_seed(0)
        return arch, side, patch

    return install


def configuration(arch, side, *, model=None, optim=None, runtime=None):
    augment = dataclasses.replace(TrainConfig(target="t", out="o").augment, size=side)
    return TrainConfig(
        target="images",
        out="run",
        model=ModelConfig(arch=arch, head_dim=16, **{"bn": "plain", **(model or {})}),
        method=MethodConfig(queue_size=32),
        augment=augment,
        data=DataConfig(batch_size=4),
        optim=OptimConfig(**(optim or {"optimizer": "adamw", "lr": 1e-3})),
        runtime=RuntimeConfig(device="cpu", **(runtime or {})),
    )


def by_preset(arch, side, family, **more):
    """A configuration with a preset's values, as from the command line."""
    model, optim = {}, {}
    for option, value in preset_options(family, arch, 2).items():
        group, _, name = option.partition(".")
        {"model": model, "optim": optim}[group][name] = value
    return configuration(arch, side, model=model, optim={**optim, "epochs": 2}, **more)


def a_batch(side, images=4):
    query, key = torch.randn(2, images, 3, side, side, generator=torch.Generator().manual_seed(5))
    query, key = (view.contiguous(memory_format=torch.channels_last) for view in (query, key))
    return Batch(query, key, torch.arange(images), torch.zeros(images, dtype=torch.bool), 0, 0)


def steps(config, side, count=2):
    learner, _ = build_learner(config, ALONE)
    records = [train_step(learner, a_batch(side), lambda part: None) for _ in range(count)]
    return learner, torch.stack(records)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_vit_trains_with_the_preset_of_its_family(small, kind):
    arch, side, _ = small(kind)
    family = "vit" if kind in VITS else "convnext" if kind == "convnext" else "resnet"
    learner, records = steps(by_preset(arch, side, family), side)
    assert records.isfinite().all()
    before, _ = build_learner(by_preset(arch, side, family), ALONE)
    old = dict(before.moco.query_encoder.named_parameters())
    still = {n for n, p in learner.moco.query_encoder.named_parameters() if torch.equal(p, old[n])}
    frozen = {f"backbone.network.patch_embed.proj.{part}" for part in ("weight", "bias")} if kind in VITS else set()
    assert still == frozen
    if kind in VITS:
        groups = {(group["lr_scale"], group["weight_decay"]) for group in learner.optimizer.param_groups}
        assert {scale for scale, _ in groups} == {1.0, 0.9, 0.9**2, 0.9**3}  # head, two blocks, the layers before them
        decay = {id(p): g["weight_decay"] for g in learner.optimizer.param_groups for p in g["params"]}
        network = learner.moco.query_encoder.backbone.network
        assert decay[id(network.cls_token)] == decay[id(network.norm.weight)] == 0.0
        assert decay[id(network.blocks[0].attn.qkv.weight)] == 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", VITS)
def test_other_input_sizes_work_and_the_native_one_equals_timm(small, kind):
    arch, side, patch = small(kind)
    backbone = build_backbone(arch).eval()
    plain = timm.create_model(arch.removeprefix("timm:"), num_classes=0).eval()
    plain.load_state_dict(backbone.network.state_dict())
    own = backbone.input_size
    images = torch.randn(1, 3, own, own)
    torch.testing.assert_close(backbone(images), plain(images), rtol=1e-5, atol=1e-5)
    for other in (side, side + patch):
        assert backbone(torch.randn(2, 3, other, other)).shape == (2, 48)
    with pytest.raises(
        ValueError, match=rf"size={side + 1}: .*multiple of its patch's, {patch} pixels; choose {side} or"
    ):
        backbone(torch.randn(2, 3, side + 1, side + 1))
    with pytest.raises(ValueError, match=rf"augment.size={side + 1}: timm:"):
        build_learner(configuration(arch, side + 1), ALONE)


@torch.no_grad()
@pytest.mark.parametrize("kind", VITS)
def test_pooling_uses_the_named_tokens(small, kind, tmp_path):
    arch, side, _ = small(kind)
    backbone = build_backbone(arch).eval()
    images = torch.randn(2, 3, side, side)
    tokens = backbone.network.forward_features(images)
    count = backbone.network.num_prefix_tokens
    assert count == (1 if kind in ("vit", "dinov2") else 5)
    own = backbone(images)
    wanted = {"cls": tokens[:, 0], "mean": tokens[:, count:].mean(1)}
    for pool, features in wanted.items():
        backbone.adopt(Traits(pool=pool))
        torch.testing.assert_close(backbone(images), features)
        export_backbone(backbone, tmp_path / f"{pool}.safetensors")
        torch.testing.assert_close(load_backbone(tmp_path / f"{pool}.safetensors")(images), features)
    backbone.adopt(Traits())
    torch.testing.assert_close(backbone(images), own)
    learner, _ = build_learner(configuration(arch, side, model={"pool": "mean"}), ALONE)
    assert learner.moco.key_encoder.backbone.traits.pool == "mean"


@torch.no_grad()
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_exports_keep_the_pooling(small, pool, tmp_path):
    small("dinov2 with registers")
    backbone = build_backbone("timm:vit_small_patch14_reg4_dinov2").eval()
    backbone.adopt(Traits(pool=pool))
    export_backbone(backbone, tmp_path / "b.safetensors")
    export(tmp_path / "b.safetensors", tmp_path / "b.pt2", layout="torch_export")
    images = torch.randn(3, 3, backbone.input_size, backbone.input_size)
    program = torch.export.load(tmp_path / "b.pt2").module()
    torch.testing.assert_close(program(images), backbone(images), rtol=1e-4, atol=1e-4)
    for layout, name in (("timm", "t.safetensors"), ("fastuft", "b.safetensors")):
        if layout == "timm":
            export(tmp_path / "b.safetensors", tmp_path / name, layout=layout)
        scope = {"timm": timm, "fastuft": fastuft, "load_file": load_file, "images": images}
        exec(_use(backbone, layout, name).replace(repr(name), repr(str(tmp_path / name))), scope)  # as the card says
        torch.testing.assert_close(scope["features"], backbone(images), rtol=1e-4, atol=1e-4)


def test_pooling_without_the_needed_tokens_is_refused():
    with pytest.raises(ValueError, match=r"model.pool='cls' is for ViTs"):
        build_backbone("timm:convnext_atto").adopt(Traits(pool="cls"))
    with pytest.raises(ValueError, match=r"model.pool='cls': .* has no class token; choose mean"):
        build_backbone("timm:vit_relpos_small_patch16_224").adopt(Traits(pool="cls"))
    with pytest.raises(ValueError, match="is not available for timm:vgg11"):
        build_backbone("timm:vgg11", drop_path=0.1)
    relative = "timm:vit_relpos_small_patch16_224"
    with pytest.raises(ValueError, match=rf"augment.size=96: {relative} takes images of 224 pixels only; choose that"):
        build_learner(configuration(relative, 96), ALONE)


@pytest.mark.parametrize("kind", ["vit", "dinov3", "convnext", "efficientnet"])
def test_only_the_query_encoder_has_stochastic_depth(small, kind):
    arch, side, _ = small(kind)
    backbone = build_backbone(arch, drop_path=0.5)
    moco = MoCo(backbone, 8).train()
    images = torch.randn(8, 3, side, side)
    with torch.no_grad():
        assert not torch.equal(moco.query_encoder(images), moco.query_encoder(images))
        assert torch.equal(moco.key_encoder(images), moco.key_encoder(images))
    norms = [m for m in moco.key_encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(norm.training for norm in norms) and bool(norms) == (kind == "efficientnet")
    rates = [m.drop_prob for m in moco.query_encoder.modules() if type(m).__name__ == "DropPath"]
    assert rates == sorted(rates) and 0.4 < rates[-1] <= 0.5


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
@pytest.mark.parametrize("kind", NETWORKS)
def test_recomputed_activations_give_the_same_step(small, kind, drop_path):
    if drop_path and kind in ("resnet18", "efficientnet", "timm's resnet18"):
        pytest.skip("no stochastic depth, or slow")
    arch, side, _ = small(kind)
    done = {}
    for recompute in (False, True):
        config = configuration(
            arch, side, model={"drop_path": drop_path}, runtime={"checkpoint_activations": recompute}
        )
        learner, _ = build_learner(config, ALONE)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t.nbytes) or t, lambda t: t):
            learner.query(a_batch(side).query)
        learner, records = steps(config, side)
        done[recompute] = records, learner.moco.state_dict(), sum(kept)
    torch.testing.assert_close(done[True][:2], done[False][:2], rtol=0, atol=0)
    assert done[True][2] < 0.75 * done[False][2]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["vit", "dinov3"])
def test_compiled_encoders_give_the_same_step(small, kind, recompute):
    arch, side, _ = small(kind)
    config = by_preset(arch, side, "vit", runtime={"checkpoint_activations": recompute})
    _, eager = steps(config, side, 1)
    torch._dynamo.reset()
    learner, _ = build_learner(config, ALONE)
    learner.query = torch.compile(learner.query, backend="aot_eager", fullgraph=True)
    learner.key = torch.compile(learner.key, backend="aot_eager", fullgraph=True)
    compiled = train_step(learner, a_batch(side), lambda part: None)
    torch.testing.assert_close(compiled, eager[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["efficientnet_lite0", "mobilenetv3_small_050"])
def test_split_batchnorm_of_timm_networks_equals_the_network_on_each_group(arch):
    """Layers with their activation inside (BatchNormAct2d) too; in fp64, so that rounding does not grow with depth."""
    torch.manual_seed(0)
    whole = timm.create_model(arch, num_classes=0).double().train()
    split = set_batchnorm_mode(copy.deepcopy(whole), "split", 4)
    images, keys = torch.randn(8, 3, 32, 32, dtype=torch.float64), list(whole.state_dict())
    assert list(split.state_dict()) == keys
    assert not any(type(layer).__name__ in ("BatchNorm2d", "BatchNormAct2d") for layer in split.modules())
    ours, theirs = split(images), torch.cat([whole(part) for part in images.split(4)])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (name, mine), other in zip(split.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
    expected = split.eval()(images)
    plain = set_batchnorm_mode(split, "plain")
    torch.testing.assert_close(plain(images), expected, rtol=0, atol=0)
