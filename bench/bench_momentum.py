"""The key encoder's moving average: one fused pass over all parameters, beside other ways.

Claim: ``theta_k <- m theta_k + (1 - m) theta_q`` over a ResNet-50 runs at the bandwidth of a copy, without temporaries. MoCo's
loop allocates every parameter twice, and two fused passes read and write the key encoder twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from harness import measure, peak_extra_bytes, peer
from torch import nn

from fastuft.model import MoCo, build_backbone

MOMENTUM = 0.999
ARCHS = {"smoke": ("resnet_tiny", "small"), "cpu": ("resnet50", "imagenet"), "cuda": ("resnet50", "imagenet")}


def fastuft(moco: MoCo) -> Callable[[], None]:
    return lambda: moco.momentum_update_(MOMENTUM)


def moco_loop(moco: MoCo) -> Callable[[], None]:
    @torch.no_grad()
    def update() -> None:
        for key, query in zip(moco.key_encoder.parameters(), moco.query_encoder.parameters(), strict=True):
            key.data = key.data * MOMENTUM + query.data * (1.0 - MOMENTUM)

    return update


def lightly(moco: MoCo) -> Callable[[], None]:
    update = peer("lightly.models.utils", "lightly").update_momentum
    return lambda: update(moco.query_encoder, moco.key_encoder, m=MOMENTUM)


def torch_swa_utils(moco: MoCo) -> Callable[[], None]:
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(MOMENTUM)
    keys, queries = ([p.detach() for p in e.parameters()] for e in (moco.key_encoder, moco.query_encoder))
    return lambda: average(keys, queries, None)


WAYS = {way.__name__: way for way in (fastuft, moco_loop, lightly, torch_swa_utils)}


@pytest.fixture(scope="module")
def pair(scale, device) -> MoCo:
    moco = MoCo(build_backbone(*ARCHS[scale]), 128).to(device)
    with torch.no_grad():
        for parameter in moco.query_encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    return moco


@pytest.mark.parametrize("way", WAYS)
def test_moving_average(benchmark, pair, scale, device, ceilings, way):
    moco, other = copy.deepcopy(pair), copy.deepcopy(pair)
    update = WAYS[way](moco)
    update()
    moco_loop(other)()
    for ours, theirs in zip(moco.key_encoder.parameters(), other.key_encoder.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    size = sum(p.nbytes for p in moco.key_encoder.parameters())
    measure(
        benchmark,
        update,
        group=f"moving average, {ARCHS[scale][0]}, {size / 1e6:.0f} MB",
        baseline=way == "moco_loop",
        ceilings=ceilings,
        bytes_moved=3.0 * size,
        device=device,
        graph=way != "moco_loop",  # it replaces the parameters' memory
    )


def test_no_temporary(pair, device):
    moco: nn.Module = copy.deepcopy(pair)
    size = sum(p.nbytes for p in pair.key_encoder.parameters())
    assert peak_extra_bytes(lambda: moco.momentum_update_(MOMENTUM), device=device) < size / 10
