"""Networks with random weights give the features of the library that saved them, also after an export."""

from __future__ import annotations

import json

import pytest
import torch

from fastuft.model import build_backbone, load_backbone, load_init

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
pytestmark = pytest.mark.peers

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def spread_(network: torch.nn.Module) -> torch.nn.Module:
    """Move weights away from their initial zeros and ones, so that a missing tensor is detected."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if value.is_floating_point() and value.ndim < 2:
            low = 0.5 if name.endswith(("weight", "var", "lambda1", "gamma", "parameter")) else -0.2
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + low)
        elif name.endswith(("token", "tokens", "embeddings")):
            value.copy_(torch.randn(value.shape, generator=generator))
    return network.eval()


def vit(kind: str, **changes):
    size = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**{**size, **changes}))


def build_timm(name: str, **changes):
    """Small timm networks under names of the tests."""
    return timm.create_model(name, num_classes=0, **changes)


def resnet(kind: str, depths, widths):
    return transformers.ResNetModel(transformers.ResNetConfig(layer_type=kind, depths=depths, hidden_sizes=widths))


def token(network, images):
    return network(images).last_hidden_state[:, 0]


def patches(network, images):
    return network(images).last_hidden_state[:, 5:].mean(1)


def pooled(network, images):
    return network(images).pooler_output.flatten(1)


# kind -> (our arch, changes of timm's network, their network, their features, side of the images)
NETWORKS = {
    "resnet18": ("resnet18", {}, lambda: resnet("basic", [2, 2, 2, 2], [64, 128, 256, 512]), pooled, 64),
    "resnet50": ("resnet50", {}, lambda: resnet("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048]), pooled, 64),
    "vit": (
        "timm:vit_tiny_patch16_224",
        {"depth": 2},
        lambda: vit("ViT", intermediate_size=768),
        token,
        224,
    ),
    "dinov2": (
        "timm:vit_small_patch14_dinov2",
        {"depth": 2, "embed_dim": 192, "num_heads": 3, "img_size": 70},
        lambda: vit("Dinov2", patch_size=14, image_size=70),
        token,
        70,
    ),
    "dinov2 with registers": (
        "timm:vit_small_patch14_reg4_dinov2",
        {"depth": 2, "embed_dim": 192, "num_heads": 3, "img_size": 70},
        lambda: vit("Dinov2WithRegisters", patch_size=14, image_size=70),
        token,
        70,
    ),
    "dinov3": (
        "timm:vit_small_patch16_dinov3_qkvb",
        {"depth": 2, "embed_dim": 192, "num_heads": 3},
        lambda: vit("DINOv3ViT", intermediate_size=768, num_register_tokens=4),
        patches,
        64,
    ),
    "convnext": (
        "timm:convnext_tiny",
        {},
        lambda: transformers.ConvNextModel(transformers.ConvNextConfig()),
        pooled,
        64,
    ),
    "convnext with 1x1 convolutions": (
        "timm:convnext_atto",
        {},
        lambda: transformers.ConvNextModel(
            transformers.ConvNextConfig(depths=[2, 2, 6, 2], hidden_sizes=[40, 80, 160, 320])
        ),
        pooled,
        64,
    ),
    "dinov3 convnext": (
        "timm:convnext_tiny",
        {},
        lambda: transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig()),
        pooled,
        64,
    ),
}


@pytest.fixture
def smaller(monkeypatch):
    """Make ``timm.create_model`` build small versions of the networks in the table."""
    create = timm.create_model

    def install(changes):
        monkeypatch.setattr(timm, "create_model", lambda name, **given: create(name, **{**given, **changes}))

    return install


@torch.no_grad()
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_transformers_folders_reproduce_their_features(tmp_path, smaller, kind, shards):
    arch, changes, make, features, side = NETWORKS[kind]
    smaller(changes)
    theirs = spread_(make())
    theirs.save_pretrained(tmp_path, max_shard_size="1MB" if shards else "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not shards
    images = torch.randn(2, 3, side, side)
    ours = load_backbone(tmp_path, arch)
    torch.testing.assert_close(ours(images), features(theirs, images), **TOLERANCE)
    # and again from a run's own export, which keeps what the network does otherwise
    from fastuft.model import export_backbone

    export_backbone(ours, tmp_path / "again" / "backbone.safetensors")
    torch.testing.assert_close(load_backbone(tmp_path / "again" / "backbone.safetensors")(images), ours(images))


@pytest.mark.parametrize(
    ("make", "arch"),
    [
        (lambda: resnet("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048]), "resnet50"),
        (lambda: transformers.ViTModel(transformers.ViTConfig()), "timm:vit_base_patch16_224"),
        (lambda: transformers.ConvNextModel(transformers.ConvNextConfig()), "timm:convnext_tiny"),
    ],
)
def test_common_transformers_networks_are_identified_by_configuration(tmp_path, make, arch):
    make().save_pretrained(tmp_path)
    assert load_backbone(tmp_path).arch == arch


def test_the_preprocessors_normalization_is_used(tmp_path):
    resnet("basic", [2, 2, 2, 2], [64, 128, 256, 512]).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3})
    )
    ours = load_backbone(tmp_path)
    assert (ours.arch, ours.mean, ours.std) == ("resnet18", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def authors_dinov2(state, *, registers: bool, chunks: bool) -> dict:
    """A timm network's tensors under the names of DINOv2's training code."""
    state = dict(state)
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.full_like(state["pos_embed"][:, :1], 0.25), state["pos_embed"]], 1)
        state["cls_token"] = state["cls_token"] - 0.25
    state["mask_token"] = torch.zeros(1, 192)
    chunked = {}
    for name, value in state.items():
        parts = name.split(".")
        chunked[".".join(["blocks", "0", *parts[1:]]) if chunks and parts[0] == "blocks" else name] = value
    return chunked


@torch.no_grad()
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("chunks", [False, True])
def test_original_dinov2_checkpoints_load_teacher_or_student(tmp_path, smaller, registers, chunks):
    arch = "timm:vit_small_patch14_reg4_dinov2" if registers else "timm:vit_small_patch14_dinov2"
    smaller({"depth": 2, "embed_dim": 192, "num_heads": 3, "img_size": 70})
    networks = {name: spread_(build_backbone(arch).network) for name in ("teacher", "student")}
    networks["student"].blocks[1].mlp.fc1.weight.normal_()
    content = {
        name: {
            f"backbone.{k}": v for k, v in authors_dinov2(n.state_dict(), registers=registers, chunks=chunks).items()
        }
        for name, n in networks.items()
    }
    torch.save(content, tmp_path / "teacher_checkpoint.pth")
    images = torch.randn(2, 3, 70, 70)
    for key in ("teacher", "student"):
        ours = build_backbone(arch).eval()
        load_init(ours, tmp_path / "teacher_checkpoint.pth", key=key)
        torch.testing.assert_close(ours(images), networks[key](images), **TOLERANCE)
    assert load_init(ours, tmp_path / "teacher_checkpoint.pth").others == ("teacher.backbone",)


@torch.no_grad()
def test_original_dinov3_checkpoints_load_and_unmatched_biases_are_refused(tmp_path, smaller):
    smaller({"depth": 2, "embed_dim": 192, "num_heads": 3})
    theirs = spread_(build_backbone("timm:vit_small_patch16_dinov3_qkvb").network)
    state = {"mask_token": torch.zeros(1, 192), "rope_embed.periods": torch.ones(16)}
    for name, value in theirs.state_dict().items():
        name = (
            name.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        )
        if name.endswith("q_bias"):
            v_bias = theirs.state_dict()[name.replace("q_bias", "v_bias")]
            state[name.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros_like(value), v_bias])
            state[name.replace("q_bias", "qkv.bias_mask")] = torch.ones(3 * len(value))
        elif not name.endswith("v_bias"):
            state[name] = value
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, tmp_path / "x.pth")
    ours = build_backbone("timm:vit_small_patch16_dinov3_qkvb").eval()
    assert load_init(ours, tmp_path / "x.pth").layout.startswith("DINOv3 names")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), **TOLERANCE)
    with pytest.raises(ValueError, match=r"more tensors of such layers.*attn\.qkv\.bias"):
        load_init(build_backbone("timm:vit_small_patch16_dinov3"), tmp_path / "x.pth")


@torch.no_grad()
def test_original_dino_checkpoints_load_by_timm_names(tmp_path):
    theirs = spread_(timm.create_model("vit_tiny_patch16_224", num_classes=0))
    state = {f"module.backbone.{name}": value for name, value in theirs.state_dict().items()}
    state |= {"module.head.mlp.0.weight": torch.randn(8, 192)}
    torch.save({"student": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    images = torch.randn(2, 3, 224, 224)
    ours = load_backbone(tmp_path / "checkpoint.pth", "timm:vit_tiny_patch16_224", key="student")
    torch.testing.assert_close(ours(images), theirs(images), **TOLERANCE)


def test_a_deeper_vit_is_not_truncated(tmp_path, smaller):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "x.pth")
    smaller({"depth": 2})
    with pytest.raises(ValueError, match="has a larger network than timm:vit_tiny_patch16_224"):
        load_init(build_backbone("timm:vit_tiny_patch16_224"), tmp_path / "x.pth")


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3_small_100",
        "mobilenetv4_conv_small",
        "efficientnet_lite0",
        "convnext_atto",
        "regnetx_002",
        "ghostnet_100",
        "hardcorenas_a",
        "repvgg_a0",
        "vgg11",
        "tinynet_e",
        "lcnet_050",
        "efficientvit_b0",
        "deit_tiny_distilled_patch16_224",
        "mixer_s32_224",
        "swin_tiny_patch4_window7_224",
        "xcit_nano_12_p16_224",
        "levit_128s",
        "pvt_v2_b0",
        "edgenext_xx_small",
    ],
)
def test_num_features_is_the_width_of_timm_features(name):
    backbone = build_backbone(f"timm:{name}").eval()
    images = torch.randn(2, 3, backbone.input_size, backbone.input_size)
    assert backbone(images).shape == (2, backbone.num_features)
