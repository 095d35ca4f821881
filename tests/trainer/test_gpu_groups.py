"""The calls of a GPU run to torch.distributed, with stand-ins for devices and NCCL."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fastuft.trainer import distributed
from fastuft.trainer.distributed import Ranks, start_ranks, stop_ranks

CUDA = torch.device("cuda", 1)


@pytest.fixture
def ends(monkeypatch):
    """How the group was left: "abort" or "destroy"."""
    seen = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=SimpleNamespace(abort=lambda: seen.append("abort"))))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: seen.append("destroy"))
    return seen


@pytest.mark.parametrize(
    ("device", "failed", "expected"),
    [(CUDA, True, ["abort"]), (CUDA, False, ["destroy"]), (torch.device("cpu"), True, ["destroy"])],
)
def test_only_a_failed_group_of_gpus_is_aborted(ends, device, failed, expected):
    stop_ranks(Ranks(1, 2, device, None, joined=True), failed=failed)
    assert ends == expected


def test_a_process_group_of_the_caller_is_left_alone(ends):
    stop_ranks(Ranks(1, 2, CUDA, None, joined=False), failed=True)
    assert ends == []


def test_nccl_is_bound_to_the_device_of_its_process(monkeypatch):
    asked, current = {}, []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "choose_device", lambda device, option, index: torch.device("cuda", index))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options, backend=backend))
    monkeypatch.setattr(dist, "new_group", lambda **options: options["backend"])
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    ranks = start_ranks("auto", 30)
    assert asked["backend"] == "nccl" and asked["device_id"] == CUDA and asked["timeout"].total_seconds() == 30
    assert current == [CUDA]
    assert (ranks.device, ranks.control, ranks.joined) == (CUDA, "gloo", True)
