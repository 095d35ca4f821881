"""The ring buffer of keys, in state dicts, checkpoints and distributed processes."""

from __future__ import annotations

import copy
import os
import socket
from collections import deque

import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DTYPES, FP8, name_of
from torch import nn
from torch.nn import functional as F

import fastuft

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=name_of)
def test_a_queue_starts_with_random_unit_rows(dtype, device):
    queue = fastuft.KeyQueue(50, 24, dtype=dtype, device=device)
    assert queue.keys.shape == (50, 24) and queue.keys.dtype == dtype and queue.keys.device.type == device
    assert queue.pointer.dtype == torch.int64 and queue.pointer == 0
    torch.testing.assert_close(queue.keys.double().norm(dim=1).cpu(), torch.ones(50).double(), rtol=0, atol=0.02)
    assert queue.keys.double().std() > 0.1
    assert not list(queue.parameters())
    assert repr(queue) == "KeyQueue(size=50, dim=24)"


def test_the_random_start_follows_the_generator():
    first, second = (fastuft.KeyQueue(9, 4, generator=torch.Generator().manual_seed(s)).keys for s in (3, 3))
    other = fastuft.KeyQueue(9, 4, generator=torch.Generator().manual_seed(4)).keys
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 12), batches=st.lists(st.integers(0, 30), max_size=6))
def test_a_queue_has_the_last_keys_in_ring_order(device, size, batches):
    queue = fastuft.KeyQueue(size, 4, device=device)
    start = queue.keys.clone()
    written: deque[torch.Tensor] = deque(maxlen=size)
    total = 0
    for batch in batches:
        keys = 5 * torch.randn(batch, 4, device=device)
        before = keys.clone()
        address = queue.keys.data_ptr()
        queue.enqueue_(keys)
        assert torch.equal(keys, before) and queue.keys.data_ptr() == address
        written.extend(F.normalize(keys, dim=1))
        total += batch
    assert queue.pointer == total % size
    expected = start
    for age, key in enumerate(reversed(written), 1):
        expected[(total - age) % size] = key
    torch.testing.assert_close(queue.keys, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_queue_takes_keys_of_any_dtype_and_layout(device):
    queue = fastuft.KeyQueue(8, 4, dtype=torch.float16, device=device)
    keys = torch.randn(3, 4, device=device, requires_grad=True)
    queue.enqueue_(keys)
    assert not queue.keys.requires_grad and keys.grad is None
    queue.enqueue_((1e30 * torch.randn(2, 4, device=device)).to(torch.bfloat16))
    queue.enqueue_(torch.randn(4, 2, device=device).T)
    queue.enqueue_(torch.zeros(1, 4, device=device))
    assert queue.keys.isfinite().all() and queue.pointer == 0
    norms = queue.keys.float().norm(dim=1).cpu()
    torch.testing.assert_close(norms, torch.tensor([1.0] * 7 + [0.0]), rtol=0, atol=2e-3)


def test_wrong_sizes_and_keys_are_refused():
    for size, dim, message in ((0, 4, "size=0"), (-1, 4, "size=-1"), (4, 0, "dim=0"), (4.0, 4, "size=4.0")):
        with pytest.raises(ValueError, match=f"{message} is out of range; it must be a positive integer"):
            fastuft.KeyQueue(size, dim)
    with pytest.raises(
        ValueError, match=r"dtype=torch.int64 is not allowed; choose one of torch.float32, .*float8_e4m3fn"
    ):
        fastuft.KeyQueue(4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"dtype=torch.float8_e5m2 is not allowed"):
        fastuft.KeyQueue(4, 4, dtype=torch.float8_e5m2)
    queue = fastuft.KeyQueue(8, 4)
    with pytest.raises(ValueError, match=r"keys has shape \(3, 5\); it must be \[B, 4\]"):
        queue.enqueue_(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"keys has dtype torch\.int64"):
        queue.enqueue_(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="keys is on meta but the queue is on cpu"):
        queue.enqueue_(torch.randn(3, 4, device="meta"))
    assert queue.pointer == 0


@pytest.mark.parametrize("device", DEVICES)
def test_state_dict_round_trip(device, tmp_path):
    queue = fastuft.KeyQueue(8, 4, device=device)
    queue.enqueue_(torch.randn(5, 4, device=device))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    other = fastuft.KeyQueue(8, 4)
    other.load_state_dict(torch.load(tmp_path / "queue.pt", weights_only=True, map_location="cpu"), strict=True)
    assert torch.equal(other.keys, queue.keys.cpu()) and other.pointer == 5
    new = torch.randn(6, 4)
    queue.enqueue_(new.to(device))
    other.enqueue_(new)
    torch.testing.assert_close(other.keys, queue.keys.cpu())
    assert other.pointer == queue.pointer.cpu() == 3
    with pytest.raises(RuntimeError, match="size mismatch"):
        fastuft.KeyQueue(9, 4).load_state_dict(queue.state_dict())
    assert torch.equal(copy.deepcopy(queue).keys, queue.keys)


class Learner(nn.Module):
    """A module as a training framework would checkpoint it: encoder, loss and queue."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.encoder = nn.Linear(12, 8)
        self.queue = fastuft.KeyQueue(32, 8, dtype=dtype, gather_distributed=True)
        self.loss = fastuft.InfoNCELoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = self.encoder(x.flip(0)).detach()
        loss = self.loss(self.encoder(x), keys, self.queue)
        self.queue.enqueue_(keys)
        return loss


def test_a_lightning_style_checkpoint_resumes(tmp_path):
    def train(learner, optimizer, steps):
        losses = []
        for step in steps:
            x = torch.randn(10, 12, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = learner(x)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def make():
        learner = Learner()
        return learner, torch.optim.SGD(learner.parameters(), lr=0.5, momentum=0.9)

    learner, optimizer = make()
    train(learner, optimizer, range(5))
    checkpoint = {
        "epoch": 0,
        "global_step": 5,
        "state_dict": learner.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    expected = train(learner, optimizer, range(5, 10))

    other, other_optimizer = make()
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)
    other.load_state_dict(loaded["state_dict"], strict=True)
    other_optimizer.load_state_dict(loaded["optimizer_states"][0])
    assert train(other, other_optimizer, range(5, 10)) == expected


def refusal(queue: fastuft.KeyQueue) -> str:
    with pytest.raises(ValueError, match="gather_distributed") as caught:
        queue.enqueue_(torch.ones(1, 8))
    return str(caught.value)


def own_keys(rank: int) -> torch.Tensor:
    queue = fastuft.KeyQueue(4, 8, gather_distributed=False)
    queue.enqueue_(F.one_hot(torch.full((4,), rank), 8).float())
    return queue.keys


def run_rank(rank: int, port: int, folder: str, dtype: torch.dtype) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    from fastuft.loss.lightly import NTXentLoss

    torch.manual_seed(rank)  # the ranks start with different queues; DDP gives both the first one's
    model = nn.parallel.DistributedDataParallel(Learner(dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    gathering = NTXentLoss(memory_bank_size=(10, 8), gather_distributed=True)
    gathering.load_state_dict({name: torch.zeros_like(v) for name, v in gathering.state_dict().items()})
    q = torch.randn(3, 8, requires_grad=True)
    loss = gathering(q, F.one_hot(torch.arange(3) + 4 * rank, 8).half())
    state = {
        "weight": model.module.encoder.weight.detach(),
        "gradient": model.module.encoder.weight.grad,
        "loss": loss.detach(),
        "bank": gathering.state_dict(),
        "queue": model.module.queue.state_dict(),
        "silent": refusal(fastuft.KeyQueue(4, 8)),
        "own": own_keys(rank),
    }
    torch.save(state, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=name_of)
def test_distributed_data_parallel(dtype, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (port, str(tmp_path), dtype), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["queue"].keys() == second["queue"].keys() and first["queue"]["pointer"] == 24
    assert all(torch.equal(value, second["queue"][name]) for name, value in first["queue"].items())
    for rank, state in enumerate((first, second)):
        assert "of which there are 2: build the KeyQueue with gather_distributed=True" in state["silent"]
        assert torch.equal(state["own"], F.one_hot(torch.full((4,), rank), 8).float())
    assert torch.equal(first["weight"], second["weight"]) and torch.equal(first["gradient"], second["gradient"])
    for state in (first, second):
        keys, pointer = state["bank"]["memory_bank.keys"], state["bank"]["memory_bank.pointer"]
        expected = torch.zeros(10, 8)
        expected[:6] = F.one_hot(torch.tensor([0, 1, 2, 4, 5, 6]), 8)
        assert torch.equal(keys, expected) and pointer == 6


@pytest.mark.gpu
def test_enqueue_never_synchronizes():
    queue = fastuft.KeyQueue(100, 32, device="cuda")
    keys = torch.randn(70, 32, device="cuda")
    queue.enqueue_(keys)
    torch.cuda.set_sync_debug_mode("error")
    try:
        queue.enqueue_(keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert queue.pointer.item() == 40
