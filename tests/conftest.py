"""Shared marks: GPU tests are skipped, visibly, without a CUDA device."""

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
    """No test passes on a portable path because a fused kernel was refused."""
    yield
    from fastuft import fused

    assert not fused._refusals
