"""Networks with fixed weights for the checkpoint tests."""

from __future__ import annotations

import pytest
import torch

from fastuft.model import MoCo, build_backbone


@pytest.fixture
def moco():
    torch.manual_seed(0)
    return MoCo(build_backbone("resnet18"), 16)


@pytest.fixture
def donor():
    torch.manual_seed(1)
    return MoCo(build_backbone("resnet18"), 16).query_encoder
