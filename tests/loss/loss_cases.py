"""Inputs and float64 references shared by the tests of the losses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from error_bound import GRADIENT, VALUE, assert_as_good
from loss_truth import comparisons
from torch import Tensor
from torch.nn import functional as F

import fastuft
from fastuft.kernels.problem import tile_precision
from fastuft.loss import reference

# (device, implementation): the portable path everywhere, the kernels where there is a GPU.
PATHS = [
    pytest.param(("cpu", "torch"), id="cpu-torch"),
    pytest.param(("cuda", "torch"), id="cuda-torch", marks=pytest.mark.gpu),
    pytest.param(("cuda", "triton"), id="cuda-triton", marks=pytest.mark.gpu),
]
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
FP8 = torch.float8_e4m3fn
TILES = {"ieee": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """Arguments of one call of mixed_info_nce."""

    q: Tensor
    k_a: Tensor
    k_b: Tensor
    lam: float | Tensor
    queue: Tensor
    temperature: float = 0.2
    normalize: bool = True

    @staticmethod
    def random(batch, keys, width, dtype=torch.float32, *, queue_dtype=None, device="cpu", seed=0, **options) -> Case:
        generator = torch.Generator().manual_seed(seed)
        q, k_a, k_b = (torch.randn(batch, width, generator=generator).to(device, dtype) for _ in range(3))
        queue = F.normalize(torch.randn(keys, width, generator=generator), dim=1).to(device, queue_dtype or dtype)
        lam = torch.rand(batch, generator=generator).to(device)
        return replace(Case(q, k_a, k_b, lam, queue), **options)

    @property
    def tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def to(self, dtype: torch.dtype) -> Case:
        def cast(value):
            return value.to(dtype) if isinstance(value, Tensor) else value

        return Case(*(cast(getattr(self, field)) for field in self.__dataclass_fields__))

    def run(self, function=fastuft.mixed_info_nce, **options) -> tuple[Tensor, Tensor]:
        """(loss [B], gradient of its sum in q)."""
        q = self.q.detach().requires_grad_()
        loss = function(
            q, self.k_a, self.k_b, self.lam, self.queue, self.temperature, normalize=self.normalize, **options
        )
        (gradient,) = torch.autograd.grad(loss.sum(), q)
        return loss.detach(), gradient

    def check(self, impl: str) -> None:
        """Compare loss and gradient with float64, relative to PyTorch's expression in the dtype that is multiplied."""
        before = [tensor.clone() for tensor in self.tensors]
        found = self.run(reduction="none", impl=impl)
        exact = self.to(torch.float64).run(reference.mixed_info_nce)
        tiles = TILES[tile_precision("auto", self.q.dtype, self.queue.dtype)]
        tensors = (self.q, self.k_a, self.k_b, torch.as_tensor(self.lam), self.queue)
        losses, gradients = comparisons(tensors, tiles, self.temperature, self.normalize)
        assert found[0].dtype == torch.float32 and found[1].dtype == self.q.dtype
        assert_as_good(found[0], exact[0], losses, VALUE)
        assert_as_good(found[1], exact[1], [gradient.to(self.q.dtype) for gradient in gradients], GRADIENT)
        for old, new in zip(before, self.tensors, strict=True):
            assert torch.equal(old, new), "an input was changed"
