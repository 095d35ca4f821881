"""Settings whose tensors cannot fit into this machine are refused before they are allocated."""

from __future__ import annotations

import torch

from fastuft.config import TrainConfig
from fastuft.device import DTYPES, queue_dtype, resolve_precision
from fastuft.memory import refuse_beyond, total_memory
from fastuft.trainer.distributed import Ranks


def check_memory(config: TrainConfig, ranks: Ranks) -> None:
    """Check that the queue and the views of one rank each fit into the whole memory of their device.

    A single option can make either of them arbitrarily large. This is a lower bound: what passes may still be too much
    together with the network.

    Raises:
        ValueError: one does not fit; the message says how much it needs and how much there is.
    """
    method, data, size = config.method, config.data, config.augment.size
    width = torch.finfo(DTYPES[resolve_precision(config.runtime.precision, ranks.device)]).bits // 8
    available = total_memory(ranks.device)
    queue_width = queue_dtype(method.queue_dtype, config.runtime.precision, ranks.device).itemsize
    refuse_beyond(
        available,
        method.queue_size * config.model.head_dim * queue_width,
        f"method.queue_size={method.queue_size} keys of model.head_dim={config.model.head_dim} numbers",
        "choose a smaller queue",
    )
    images = data.batch_size // ranks.world_size
    refuse_beyond(
        available,
        2 * images * 3 * size * size * width * data.prefetch,
        f"augment.size={size} with {images} images per process (data.batch_size={data.batch_size}), two views each and "
        f"data.prefetch={data.prefetch}",
        "choose smaller views, a smaller batch, or fewer prefetched batches",
    )
