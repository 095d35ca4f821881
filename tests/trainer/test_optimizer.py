"""The optimizers on a CPU equal torch's SGD and AdamW without copying channels_last weights; parameter groups."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from fastuft.config import OptimConfig
from fastuft.model import Encoder, build_backbone
from fastuft.trainer.optimizer import build_optimizer
from fastuft.trainer.parameter_groups import parameter_groups

CPU = torch.device("cpu")


def network():
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 5)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def gradients(model):
    images = torch.randn(16, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    model.zero_grad()
    model(images).square().mean().backward()


def assert_same_steps(ours, theirs):
    """Five steps of two (model, optimizer) on equal gradients give equal weights in the same layout."""
    for seed in range(5):
        for model, its in (ours, theirs):
            torch.manual_seed(seed)
            gradients(model)
            its.step()
    for mine, other in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        assert mine.stride() == other.stride()


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_steps_equal_plain_sgd(momentum):
    ours, theirs = network(), network()
    theirs[4].bias.requires_grad_(False)
    ours[4].bias.requires_grad_(False)  # a parameter without a gradient stays
    optimizer = build_optimizer(OptimConfig(lr=0.1, momentum=momentum, weight_decay=1e-2), list(ours.parameters()), CPU)
    plain = torch.optim.SGD(theirs.parameters(), 0.1, momentum=momentum, weight_decay=1e-2, foreach=False, fused=False)
    assert_same_steps((ours, optimizer), (theirs, plain))


def test_the_state_dict_equals_plain_sgd():
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


def test_an_overflowed_step_is_skipped():
    model = network()
    optimizer = build_optimizer(OptimConfig(lr=0.1), list(model.parameters()), CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler.scale(model(torch.full((2, 3, 6, 6), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


def test_a_step_makes_no_copies():
    model = network()
    optimizer = build_optimizer(OptimConfig(lr=0.1), list(model.parameters()), CPU)
    gradients(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    called = {event.key for event in profile.key_averages()}
    assert "aten::_fused_sgd_" in called and not called & {"aten::copy_", "aten::clone", "aten::contiguous"}


def test_steps_equal_plain_adamw():
    ours, theirs = network(), network()
    for model in (ours, theirs):
        # A parameter without a gradient stays. This one's would be rounding alone, of which AdamW makes whole steps: the
        # The following BatchNorm cancels a bias.
        model[0].bias.requires_grad_(False)
    config = OptimConfig(optimizer="adamw", lr=0.01, weight_decay=0.1, betas=(0.8, 0.95))
    optimizer = build_optimizer(config, list(ours.parameters()), CPU)
    plain = torch.optim.AdamW(theirs.parameters(), 0.01, (0.8, 0.95), weight_decay=0.1, foreach=False, fused=False)
    assert_same_steps((ours, optimizer), (theirs, plain))
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # its state is torch's
    for model, its in ((ours, optimizer), (theirs, plain)):
        torch.manual_seed(9)
        gradients(model)
        its.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-5, atol=1e-6)


def test_adamw_makes_no_copies_and_skips_overflowed_steps():
    model = network()
    optimizer = build_optimizer(OptimConfig(optimizer="adamw", lr=0.1), list(model.parameters()), CPU)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.full((2, 3, 6, 6), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(map(torch.equal, model.parameters(), before))
    assert all(state["step"] == 0 for state in optimizer.state.values())
    gradients(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    called = {event.key for event in profile.key_averages()}
    assert "aten::_fused_adamw_" in called and not called & {"aten::clone", "aten::contiguous"}


def layered(**options):
    """Parameter groups of the demo's network: {name: (factor of the rate, decay or None for the optimizer's)}."""
    encoder = Encoder(build_backbone("resnet_tiny", "small"), 4)
    groups = parameter_groups(encoder, OptimConfig(**options))
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    assert isinstance(groups[0], dict)
    found = {
        names[id(p)]: (group.get("lr_scale"), group.get("weight_decay")) for group in groups for p in group["params"]
    }
    assert found.keys() == dict(encoder.named_parameters()).keys()
    return found


def test_layer_decay_falls_toward_the_input_and_vectors_have_no_weight_decay():
    found = layered(layer_decay=0.5, decay_norms=False)
    assert found["head.2.weight"] == (1.0, None) and found["head.2.bias"] == (1.0, 0.0)
    assert found["backbone.layer3.0.conv2.weight"] == (0.5, None)
    assert found["backbone.layer3.0.downsample.1.weight"] == (0.5, 0.0)
    assert found["backbone.layer1.0.conv1.weight"] == (0.125, None)
    assert found["backbone.conv1.weight"] == (0.0625, None) and found["backbone.bn1.bias"] == (0.0625, 0.0)
    assert {scale for scale, _ in layered(decay_norms=False).values()} == {1.0}
    assert {decay for _, decay in layered(layer_decay=0.5).values()} == {None}
    assert layered(optimizer="lars")["backbone.bn1.bias"] == (1.0, 0.0)  # whatever decay_norms says


def test_recipe_paper_has_one_parameter_group():
    encoder = Encoder(build_backbone("resnet_tiny", "small"), 4)
    encoder.backbone.conv1.weight.requires_grad_(False)
    groups = parameter_groups(encoder, OptimConfig())
    assert [id(p) for p in groups] == [id(p) for p in encoder.parameters()][1:]


def test_lars_without_timm_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ValueError, match=r"optim.optimizer='lars' needs timm.*pip install 'fastuft\[timm\]'"):
        build_optimizer(OptimConfig(optimizer="lars"), list(network().parameters()), CPU)


@pytest.mark.peers
def test_lars_equals_the_papers_update():
    """You et al. 2017, Algorithm 1, with a rate per tensor only for tensors with weight decay."""
    pytest.importorskip("timm.optim")
    encoder = Encoder(build_backbone("resnet_tiny", "small"), 4)
    config = OptimConfig(optimizer="lars", lr=0.5, momentum=0.0, weight_decay=0.01)
    optimizer = build_optimizer(config, parameter_groups(encoder, config), CPU)
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    encoder(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    for name, parameter in encoder.named_parameters():
        gradient, old = parameter.grad, before[name]
        if parameter.ndim > 1:
            local = 0.001 * old.norm() / (gradient.norm() + 0.01 * old.norm())
            torch.testing.assert_close(parameter, old - 0.5 * local * (gradient + 0.01 * old))
        else:
            torch.testing.assert_close(parameter, old - 0.5 * gradient)
