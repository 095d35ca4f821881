"""The optimizer on a CPU is torch's SGD, without copies of channels_last weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastuft.config import OptimConfig
from fastuft.trainer.optimizer import build_optimizer

CPU = torch.device("cpu")


def network():
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 5)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def gradients(model):
    images = torch.randn(16, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    model.zero_grad()
    model(images).square().mean().backward()


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_steps_are_those_of_plain_sgd(momentum):
    ours, theirs = network(), network()
    theirs[4].bias.requires_grad_(False)
    ours[4].bias.requires_grad_(False)  # a parameter without a gradient stays
    optimizer = build_optimizer(OptimConfig(lr=0.1, momentum=momentum, weight_decay=1e-2), list(ours.parameters()), CPU)
    plain = torch.optim.SGD(theirs.parameters(), 0.1, momentum=momentum, weight_decay=1e-2, foreach=False, fused=False)
    for seed in range(5):
        for model, its in ((ours, optimizer), (theirs, plain)):
            torch.manual_seed(seed)
            gradients(model)
            its.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        assert mine.stride() == other.stride()


def test_its_state_is_that_of_plain_sgd():
    model = network()
    optimizer = build_optimizer(OptimConfig(lr=0.1), list(model.parameters()), CPU)
    gradients(model)
    optimizer.step()
    twin = copy.deepcopy(model)
    plain = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model_, its in ((model, optimizer), (twin, plain)):
        torch.manual_seed(1)
        gradients(model_)
        its.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_a_step_that_overflowed_is_left_out():
    model = network()
    optimizer = build_optimizer(OptimConfig(lr=0.1), list(model.parameters()), CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler.scale(model(torch.full((2, 3, 6, 6), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


def test_nothing_is_copied():
    model = network()
    optimizer = build_optimizer(OptimConfig(lr=0.1), list(model.parameters()), CPU)
    gradients(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    called = {event.key for event in profile.key_averages()}
    assert "aten::_fused_sgd_" in called and not called & {"aten::copy_", "aten::clone", "aten::contiguous"}
