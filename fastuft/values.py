"""Whether the host may read a tensor's values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def visible(value: Tensor) -> bool:
    """True on the CPU; on a GPU the host would wait for the device. Traced and fake tensors have no values."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(value, FakeTensor)
