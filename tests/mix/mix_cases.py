"""Images for the tests of CutMix and MixUp."""

from __future__ import annotations

import itertools

import torch

DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
ORDERS = list(itertools.permutations(range(4)))


def fill(shape, dtype, order, seed):
    """Random images whose memory order of dimensions is ``order``."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 256, [shape[d] for d in order], generator=generator)
    stored = stored.to(torch.uint8) if dtype == torch.uint8 else ((stored - 128) / 37).to(dtype)
    return stored.permute([order.index(d) for d in range(4)])
