"""Settings whose tensors no machine of this size can hold are refused before memory is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastuft.config import TrainConfig
from fastuft.device import DTYPES, queue_dtype, resolve_precision
from fastuft.trainer.distributed import Ranks

_CGROUP = Path("/sys/fs/cgroup/memory.max")
_UNITS = ("bytes", "KB", "MB", "GB", "TB", "PB", "EB")


def check_memory(config: TrainConfig, ranks: Ranks) -> None:
    """Check that the queue, and the views of one rank, fit into the whole memory of the device that holds them.

    These two grow with single options without bound. It is a bound from below: what fits here may still be too much beside
    the network.

    Raises:
        ValueError: one does not fit; the message says how much it takes and how much there is.
    """
    method, data, size = config.method, config.data, config.augment.size
    width = torch.finfo(DTYPES[resolve_precision(config.runtime.precision, ranks.device)]).bits // 8
    available = total_memory(ranks.device)
    queue_width = queue_dtype(method.queue_dtype, config.runtime.precision, ranks.device).itemsize
    _refuse(
        method.queue_size * config.model.head_dim * queue_width,
        available,
        f"method.queue_size={method.queue_size} keys of model.head_dim={config.model.head_dim} numbers",
        "choose a smaller queue",
    )
    images = data.batch_size // ranks.world_size
    _refuse(
        2 * images * 3 * size * size * width * data.prefetch,
        available,
        f"augment.size={size} with {images} images per process (data.batch_size={data.batch_size}), two views each and "
        f"data.prefetch={data.prefetch}",
        "choose smaller views, a smaller batch, or fewer batches ahead",
    )


def total_memory(device: torch.device) -> int:
    """Bytes that a device has: a GPU's memory, or the machine's, at most its container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no control groups of version 2, or "max"
        return machine


def _refuse(needed: int, available: int, what: str, remedy: str) -> None:
    if needed > available:
        raise ValueError(f"{what} take {_shown(needed)}, and there are {_shown(available)}; {remedy}")


def _shown(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.0f} {_UNITS[-1]}"
