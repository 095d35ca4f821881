"""Shared marks: GPU tests skip, visibly, where there is no CUDA device."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--regenerate-golden", action="store_true", help="write tests/golden anew instead of comparing with it"
    )


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _no_fallback():
    """No test passes on a portable path in place of a fused kernel that was found wrong."""
    yield
    from fastuft import fused

    assert fused.refusals() == {}
