"""BatchNorm over groups: the operator compared with one BatchNorm per group, and checked as a torch operator."""

from __future__ import annotations

import pytest
import torch
from torch import library, nn
from torch.nn import functional as F

from fastuft.kernels.problem import BatchNorm
from fastuft.model import Encoder, ResNet, set_batchnorm_mode
from fastuft.model.batchnorm import norm_relu, one_statistics_update
from fastuft.model.grouped_batchnorm import grouped_batch_norm
from fastuft.model.resnet import BasicBlock

EPS = 1e-5


def make(dtype=torch.float32, images=6, channels=5, affine=True):
    generator = torch.Generator().manual_seed(3)
    x, residual, upstream = (
        torch.randn(images, channels, 3, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)
    )
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    if not affine:
        return x, None, None, residual.requires_grad_(), upstream
    weight, bias = (
        torch.randn(channels, generator=generator).to(max(dtype, torch.float32, key=lambda d: d.itemsize))
        for _ in range(2)
    )
    return x, weight.requires_grad_(), bias.requires_grad_(), residual.requires_grad_(), upstream


def by_group(x, weight, bias, residual, group, relu):
    """One BatchNorm per group, as in the formula."""
    y = torch.cat([F.batch_norm(part, None, None, weight, bias, True, 0.0, EPS) for part in x.split(group)])
    y = y if residual is None else y + residual
    return y.relu() if relu else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["plain", "relu", "residual"])
@pytest.mark.parametrize("group", [2, 3, 6])
def test_cpu_results_equal_one_batchnorm_per_group_bitwise(dtype, form, group):
    inputs = make(dtype)
    x, weight, bias, residual, upstream = inputs
    residual, relu = residual if form == "residual" else None, form != "plain"
    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    out, means, variances, scales = grouped_batch_norm(BatchNorm(x, weight, bias, residual, group, EPS, relu))
    expected = by_group(x, weight, bias, residual, group, relu)
    assert torch.equal(out, expected)
    assert out.stride() == x.stride()
    found = torch.autograd.grad(out, leaves, upstream)
    for ours, theirs in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        assert torch.equal(ours, theirs)
    exact = torch.stack([part.transpose(0, 1).flatten(1) for part in x.detach().double().split(group)])
    torch.testing.assert_close(means.double(), exact.mean(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variances.double(), exact.var(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scales.double(), (exact.var(2, correction=0) + EPS).rsqrt(), rtol=1e-5, atol=1e-6)


def test_without_affine_parameters():
    x, _, _, _, upstream = make(affine=False)
    out = grouped_batch_norm(BatchNorm(x, None, None, None, 3, EPS, False))[0]
    expected = by_group(x, None, None, None, 3, False)
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(y, x, upstream)[0] for y in (out, expected)))


def test_gradients_against_finite_differences():
    x, weight, bias, residual, _ = make(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *tensors: grouped_batch_norm(BatchNorm(*tensors, 3, EPS, True))[0], (x, weight, bias, residual)
    )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_operators_pass_opcheck(affine, relu):
    x, weight, bias, residual, upstream = make(affine=affine)
    library.opcheck(
        torch.ops.fastuft.grouped_batch_norm.default, (x, weight, bias, residual if relu else None, 3, EPS, relu)
    )
    with torch.no_grad():
        out, means, _, scales = grouped_batch_norm(BatchNorm(x, weight, bias, residual if relu else None, 3, EPS, relu))
        plain = [None if t is None else t.detach() for t in (x, weight)]
        library.opcheck(
            torch.ops.fastuft.grouped_batch_norm_backward.default,
            (upstream, *plain, out if relu else None, means, scales, 3, EPS, relu),
        )


def test_double_backward_is_refused():
    x, weight, bias, _, upstream = make()
    out = grouped_batch_norm(BatchNorm(x, weight, bias, None, 3, EPS, True))[0]
    with pytest.raises(RuntimeError, match="differentiable only once; omit create_graph"):
        torch.autograd.grad(out, x, upstream, create_graph=True)


def a_network():
    torch.manual_seed(0)
    network = set_batchnorm_mode(ResNet(BasicBlock, (1, 1), (8, 16), stem="small"), "split", 4)
    return network.to(memory_format=torch.channels_last)


def test_a_network_compiles_without_graph_breaks():
    network, images = a_network(), torch.randn(8, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    encoder = Encoder(network, 4)
    eager = encoder(images)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    before = network.bn1.num_batches_tracked.item()
    assert torch.equal(compiled(images), eager)
    assert network.bn1.num_batches_tracked.item() == before + 1
    eager.sum().backward()
    expected = [parameter.grad.clone() for parameter in encoder.parameters()]
    encoder.zero_grad()
    compiled(images).sum().backward()
    for parameter, gradient in zip(encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_fused_statistics_updates_equal_updates_per_layer(momentum):
    alone, together = a_network(), a_network()
    for network in (alone, together):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
    for seed in range(2):
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        alone(images)
        with one_statistics_update():
            together(images)
            assert together.bn1.num_batches_tracked == seed
    for (name, one), (_, other) in zip(alone.named_buffers(), together.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    assert alone.bn1.num_batches_tracked == 2


def test_a_failed_forward_leaves_the_running_statistics():
    network = a_network()
    with pytest.raises(RuntimeError, match="on purpose"), one_statistics_update():
        network(torch.randn(8, 3, 8, 8))
        raise RuntimeError("on purpose")
    assert network.bn1.num_batches_tracked == 0


def test_fused_activation_equals_batchnorm_then_activation():
    x = torch.randn(4, 3, 5, 5)
    residual = torch.randn_like(x)
    for mode in ("plain", "split"):
        bn = set_batchnorm_mode(nn.BatchNorm2d(3), mode, 4)
        for training in (True, False):
            bn.train(training)
            torch.testing.assert_close(norm_relu(bn, x, residual), (bn(x) + residual).relu())
            torch.testing.assert_close(norm_relu(bn, x), bn(x).relu())
