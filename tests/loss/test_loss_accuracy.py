"""The cost of rounding queries and queue: errors of loss and gradient on random rows and on features of a trained network.

Rounding is emulated: inputs are rounded as on a GPU, products and sums are float64. ``-s`` prints docs/loss.md's table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from loss_cases import FP8
from torch import Tensor, nn
from torch.nn import functional as F

import fastuft
from fastuft.loss import fp8

Rounding = Callable[[Tensor], Tensor]


def to(dtype: torch.dtype) -> Rounding:
    return lambda rows: rows.to(dtype).double()


def to_tf32(rows: Tensor) -> Tensor:
    """Round to ten bits after the leading one, to nearest even."""
    bits = rows.float().view(torch.int32)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return bits.view(torch.float32).double()


def to_fp8(rows: Tensor) -> Tensor:
    return fp8.decode(*fp8.encode(rows)).double()


# (of queries, of the queue). Decoded rows meet bf16 queries in bf16. The last two are not offered: what they would cost.
WAYS: dict[str, tuple[Rounding, Rounding]] = {
    "ieee": (to(torch.float32), to(torch.float32)),
    "tf32": (to_tf32, to_tf32),
    "fp16": (to(torch.float16), to(torch.float16)),
    "bf16": (to(torch.bfloat16), to(torch.bfloat16)),
    "fp8 queue": (to(torch.bfloat16), lambda rows: to_fp8(rows).bfloat16().double()),
    "fp8, one scale for all": (to(torch.bfloat16), lambda rows: (rows * 256).to(FP8).double() / 256),
    "fp8 queue and query": (to_fp8, to_fp8),
}


def loss_and_gradient(q: Tensor, k: Tensor, queue: Tensor, tau: float, way: tuple[Rounding, Rounding]):
    """(loss [B], its gradient [B, D]) of unit queries; the gradient ignores the rounding, as in the kernels."""
    q = q.double().requires_grad_()
    z, key = F.normalize(q, dim=1), F.normalize(k.double(), dim=1)
    rounded = z + (way[0](z.detach()) - z).detach()
    lse = (rounded @ way[1](queue.double()).T / tau).logsumexp(1)
    loss = F.softplus(lse - (z * key).sum(1) / tau, threshold=50)
    return loss.detach(), torch.autograd.grad(loss.sum(), q)[0]


def errors(q: Tensor, k: Tensor, queue: Tensor, tau: float) -> dict[str, tuple[float, float]]:
    """(mean absolute error of a sample's loss, mean relative error of its gradient) of each way."""
    exact, slope = loss_and_gradient(q, k, queue, tau, (Tensor.double, Tensor.double))
    found = {}
    for name, way in WAYS.items():
        loss, gradient = loss_and_gradient(q, k, queue, tau, way)
        relative = (gradient - slope).norm(dim=1) / slope.norm(dim=1)
        found[name] = float((loss - exact).abs().mean()), float(relative.mean())
    return found


def show(what: str, of_tau: dict[float, dict[str, tuple[float, float]]]) -> None:
    print(f"\n{what:24}" + "".join(f" tau {tau:4}: loss, gradient" for tau in of_tau))
    for name in WAYS:
        print(f"{name:24}" + "".join(f"     {e[name][0]:8.1e} {e[name][1]:8.1e}" for e in of_tau.values()))


def random_rows(keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(256, 128, generator=generator) for _ in range(2))
    return q, k, F.normalize(torch.randn(keys, 128, generator=generator), dim=1)


def test_errors_on_random_rows_are_bounded():
    for tau in (0.03, 0.07, 0.2):
        found = errors(*random_rows(1024), tau)
        assert found["ieee"][0] < 1e-6 and found["ieee"][1] < 1e-6
        assert found["tf32"][0] < 0.3 * found["bf16"][0] and found["tf32"][1] < 0.3 * found["bf16"][1]
        assert found["bf16"][0] < 1.2e-4 / tau and found["bf16"][1] < 0.005
        assert found["fp8 queue"][0] < 6e-4 / tau and found["fp8 queue"][1] < 0.03


def trained_features() -> tuple[Tensor, Tensor, Tensor]:
    """(queries, keys, queue) of a small network after 200 steps of MoCo on scikit-learn's handwritten digits."""
    digits = pytest.importorskip("sklearn.datasets").load_digits().images
    images = F.interpolate(torch.tensor(digits, dtype=torch.float32)[:, None] / 16, size=32, mode="bilinear")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)]
    encoder = nn.Sequential(*block(1, 32), *block(32, 64), *block(64, 128), *head)
    average, queue = copy.deepcopy(encoder), fastuft.KeyQueue(4096, 128, generator=generator)

    def view(x: Tensor) -> Tensor:
        """Random rotation, scale, shift and noise."""
        angle, scale = ((torch.rand(len(x), generator=generator) - 0.5) * size for size in (0.6, 0.4))
        cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
        shift = (torch.rand(len(x), 2, 1, generator=generator) - 0.5) * 0.4
        turn = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
        grid = F.affine_grid(torch.cat([turn, shift], 2), list(x.shape), align_corners=False)
        noise = 0.1 * torch.randn(x.shape, generator=generator)
        return F.grid_sample(x, grid, align_corners=False) + noise

    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(200):
        x = images[torch.randint(0, len(images), (128,), generator=generator)]
        with torch.no_grad():
            keys = average(view(x))
        loss = fastuft.info_nce(encoder(view(x)), keys, queue)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(encoder.parameters()), 0.05)
        queue.enqueue_(keys)
    x = images[torch.randint(0, len(images), (256,), generator=generator)]
    with torch.no_grad():
        return encoder(view(x)), average(view(x)), queue.keys


@pytest.mark.slow
def test_errors_on_trained_features_are_bounded():
    rows = trained_features()
    of_tau = {tau: errors(*rows, tau) for tau in (0.03, 0.07, 0.2)}
    show("random rows", {tau: errors(*random_rows(65536), tau) for tau in of_tau})
    show("a network's features", of_tau)
    for tau, found in of_tau.items():
        assert found["bf16"][0] < 6e-4 / tau and found["bf16"][1] < 0.01
        # The loss stays near bf16's; the gradient, a small difference between similar rows, does not.
        assert found["fp8 queue"][0] < 2 * found["bf16"][0]
        assert 5 * found["bf16"][1] < found["fp8 queue"][1] < 0.4
        # Why rows have scales, and why queries stay in bf16: those errors move all scores of a query alike.
        assert found["fp8, one scale for all"][0] > 1.2 * found["fp8 queue"][0]
        assert found["fp8 queue and query"][0] > 2 * found["fp8 queue"][0]
