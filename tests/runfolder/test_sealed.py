"""Backbones contain their own digest: a change of any byte is detected wherever they are read."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from fastuft.model import build_backbone, export_backbone, load_init
from fastuft.runfolder import UNSEALED, CheckpointError, RunFolder, damage, seal


@pytest.fixture
def backbone(tmp_path):
    """The exported backbone of a run folder."""
    file = RunFolder(tmp_path).backbone_file
    export_backbone(build_backbone("resnet_tiny", "small"), file)
    return file


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(bytes(content))


def test_a_sealed_file_is_a_safetensors_file_like_any_other(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    file = tmp_path / "x.safetensors"
    file.write_bytes(seal(save(tensors, metadata={"said": "0" * 32, **UNSEALED})))
    assert damage(file) is None
    assert all(torch.equal(value, tensors[name]) for name, value in load(file.read_bytes()).items())
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["said"] == "0" * 32 and len(set(metadata["fastuft_digest"])) > 1


def test_a_flip_of_any_byte_is_detected(backbone):
    assert damage(backbone) is None
    whole, size = backbone.read_bytes(), backbone.stat().st_size
    header = 8 + int.from_bytes(whole[:8], "little")
    means = whole.index(b"mean")
    for position in (*range(0, header, 97), means + 10, header, (header + size) // 2, size - 1):
        flip(backbone, position)
        assert damage(backbone) is not None, position
        backbone.write_bytes(whole)


def test_a_flipped_weight_is_refused_by_name(backbone):
    flip(backbone, -100)
    network = build_backbone("resnet_tiny", "small")
    with pytest.raises(ValueError, match=r"backbone\.safetensors does not match the digest in it: it was altered"):
        load_init(network, backbone)
    with pytest.raises(CheckpointError, match="does not match the digest in it"):
        RunFolder(backbone.parent).weights_file()


def test_a_file_without_a_digest_loads_and_one_without_its_field_is_not_sealed(tmp_path):
    plain = save({"a": torch.ones(3)})
    (tmp_path / "x.safetensors").write_bytes(plain)
    assert damage(tmp_path / "x.safetensors") is None
    with pytest.raises(ValueError, match="UNSEALED"):
        seal(plain)
