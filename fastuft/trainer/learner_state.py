"""A learner's whole state: collected from all ranks, checked, restored on the same or another number of ranks."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from fastuft.model import Backbone
from fastuft.trainer.learner import Learner
from fastuft.trainer.optimizer import load_optimizer

_BACKBONE = "query_encoder.backbone."


def state_of(learner: Learner) -> dict[str, Any]:
    """The tensors, numbers and lists that :func:`restore` restores; every rank takes part and gets the same.

    BatchNorm's buffers and the generators differ between ranks, so those of every rank are saved; ``model`` has the mean of
    the running statistics, with which another number of ranks continues.
    """
    ranks = learner.ranks
    buffers = ranks.gather_objects({name: value.cpu() for name, value in learner.moco.named_buffers()})
    cuda = torch.cuda.get_rng_state(ranks.device) if ranks.device.type == "cuda" else None
    return {
        "model": {**learner.moco.state_dict(), **_mean_over_ranks(buffers)},
        "rank_buffers": buffers,
        "queue": learner.queue.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "torch_rng": ranks.gather_objects((torch.get_rng_state(), cuda)),
    }


def restore(learner: Learner, state: dict[str, Any]) -> None:
    """Restore the learner, bit-exactly on the same number of ranks."""
    ranks = learner.ranks
    learner.moco.load_state_dict(state["model"])
    if len(state["rank_buffers"]) == ranks.world_size:
        own = state["rank_buffers"][ranks.rank]
        for name, buffer in learner.moco.named_buffers():
            buffer.copy_(own[name])
        host, cuda = state["torch_rng"][ranks.rank]
        torch.set_rng_state(host)
        if cuda is not None and ranks.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, ranks.device)
    learner.queue.load_state_dict(state["queue"])
    load_optimizer(learner.optimizer, state["optimizer"])
    learner.scaler.load_state_dict(state["scaler"])


def ranks_without_finite_weights(learner: Learner) -> list[int]:
    """Ranks whose parameters or queue hold a value that is not finite. The host waits for the device."""
    tensors = [*learner.moco.parameters(), *learner.queue.buffers()]
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all().item()
    return [rank for rank, good in enumerate(learner.ranks.gather_objects(finite)) if not good]


def queues_agree(learner: Learner) -> bool:
    """Whether all ranks have the same queue, bit by bit, by its checksum. The host waits for the device."""
    if learner.ranks.world_size == 1:
        return True
    checksum = hashlib.sha256()
    for buffer in learner.queue.buffers():
        checksum.update(buffer.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return len(set(learner.ranks.gather_objects(checksum.hexdigest()))) == 1


def backbone_of(learner: Learner, state: dict[str, Any]) -> Backbone:
    """The query encoder's backbone, with the running statistics of ``state`` if ranks have their own."""
    backbone = learner.moco.query_encoder.backbone
    if learner.ranks.world_size == 1:
        return backbone
    backbone = deepcopy(backbone).cpu()
    weights = {n.removeprefix(_BACKBONE): value for n, value in state["model"].items() if n.startswith(_BACKBONE)}
    backbone.load_state_dict(weights)
    return backbone


def _mean_over_ranks(buffers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The running statistics of the whole batch, from those of each rank's share."""
    if len(buffers) == 1:
        return buffers[0]
    return {
        name: torch.stack([own[name] for own in buffers]).mean(0) if value.is_floating_point() else value
        for name, value in buffers[0].items()
    }
