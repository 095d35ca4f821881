"""The processes of one run: ranks from torchrun's environment, the exchange of key views, agreement to stop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fastuft.device import choose_device
from fastuft.randomness import keyed_generator

# Renamed in torch 2.13, where the old name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Idle ranks wait this long for the main rank's evaluation; a dead process is noticed immediately.
_LONG_WAIT = timedelta(hours=12)


class LostRankError(RuntimeError):
    """Another process died, fell silent or diverged; the message names the step and the last good checkpoint."""


T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    Args:
        rank: rank of this process.
        world_size: number of processes.
        device: device of this process.
        control: CPU group for agreements, or None for a single process.
        joined: whether this program joined the process group, and so must leave it.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    joined: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks get the same answer."""
        if self.control is None:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.control is None:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return cast(list[T], values)

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on the main rank, on every rank; the others wait, however long its work takes.

        Raises:
            ValueError: ``make`` raised it on the main rank.
        """
        if self.control is None:
            return make()
        said: list[T | str | None] = [None, None]  # the value, and the text of an error
        if self.is_main:
            try:
                said[0] = make()
            except ValueError as error:
                said[1] = str(error)
        self.wait_for_main()
        dist.broadcast_object_list(said, src=0, group=self.control)
        if said[1] is not None:
            raise ValueError(said[1])
        return cast(T, said[0])

    def wait_for_main(self) -> None:
        """Make the other ranks wait until the main one arrives, however long its work takes."""
        if self.control is not None:
            dist.monitored_barrier(self.control, timeout=_LONG_WAIT)


class StopVote:
    """Agreement to stop. With several ranks, the answer is one step old, so that no host waits for another in a step."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._pending: tuple[dist.Work, Tensor] | None = None
        self._outcome = False

    def __call__(self, flag: bool) -> bool:
        """Cast this step's vote; True on every rank once any rank has voted to stop."""
        if self.ranks.control is None:
            return flag
        stop = self.finish()
        value = torch.tensor([int(flag)])
        work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.ranks.control, async_op=True)
        self._pending = (work, value)
        return stop

    def settle(self) -> None:
        """Wait until every rank has cast the last vote; the next call still returns its outcome.

        Call it before the host waits for a GPU: if a process is lost, this wait fails with an error, while a wait for a
        collective that the process never joined would not end.
        """
        if self._pending is not None:
            work, value = self._pending
            self._pending = None
            work.wait()
            self._outcome = bool(value.item())

    def finish(self) -> bool:
        """The outcome of the last vote cast."""
        self.settle()
        outcome, self._outcome = self._outcome, False
        return outcome


def start_ranks(device: str, timeout: float) -> Ranks:
    """Join the process group that torchrun describes, or run alone.

    Args:
        device: auto, cuda or cpu.
        timeout: seconds after which a collective gives up on a lost process.

    Raises:
        ValueError: ``cuda`` on a machine without CUDA, or more processes than devices on this machine.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    where = choose_device(device, option="runtime.device", index=local)
    cuda = where.type == "cuda"
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={local} but torch sees only {torch.cuda.device_count()} CUDA devices; start at most one process per "
            "device"
        )
    if cuda:
        torch.cuda.set_device(where)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Ranks(0, 1, where)
    wait = timedelta(seconds=timeout)
    joined = not dist.is_initialized()
    if joined:
        # A named device makes NCCL connect immediately, so a failure to connect appears here and not in a step.
        options: dict[str, Any] = {"device_id": where} if cuda else {}
        dist.init_process_group("nccl" if cuda else "gloo", timeout=wait, **_rendezvous_options(wait), **options)
    control = dist.new_group(backend="gloo", timeout=wait)
    return Ranks(dist.get_rank(), world_size, where, control, joined)


def restart_count() -> int:
    """How often torchrun has restarted the ranks after losing one (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _rendezvous_options(wait: timedelta) -> dict[str, Any]:
    """How the ranks find each other. torchrun keeps its store across restarts, with the addresses of ranks that are gone,
    so restarted ranks write theirs under other keys.
    """
    restarts = restart_count()
    if not restarts:
        return {}
    store, rank, world_size = next(iter(rendezvous("env://", timeout=wait)))
    return {"store": PrefixStore(f"restart {restarts}", store), "rank": rank, "world_size": world_size}


def stop_ranks(ranks: Ranks, *, failed: bool = False) -> None:
    """Leave the process group, if this program joined it.

    Args:
        ranks: the processes.
        failed: whether an error ends the run. On GPUs, the group is then aborted, not destroyed: a kernel that waits for a
            lost process never ends, and destroying the group would wait for it. The process must exit afterwards.

    That the abort returns while such a kernel hangs has not been tested on several GPUs.
    """
    if not ranks.joined or not dist.is_initialized():
        return
    world = dist.group.WORLD
    if failed and ranks.device.type == "cuda" and world is not None:
        world.abort()
        return
    dist.destroy_process_group()


@contextmanager
def naming_lost_ranks(ranks: Ranks, describe: Callable[[], str]) -> Iterator[None]:
    """Turn a failed collective into a LostRankError; ``describe()`` says how far the run was and how to continue.

    On a CPU, gloo raises as soon as a process is lost. On GPUs, the votes on the CPU group do, at the next step or before the
    next wait for the device. If a process is lost between its vote and the end of its kernels, only NCCL's watchdog notices;
    it ends this process after ``runtime.timeout`` with its own message. This has not been tested on several GPUs.
    """
    try:
        yield
    except LostRankError:
        raise
    except RuntimeError as error:
        text = str(error)
        failed = isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "NCCL", "ProcessGroup"))
        if ranks.world_size == 1 or not failed:
            raise
        reason = text.splitlines()[0]
        raise LostRankError(f"rank {ranks.rank} lost contact with another process {describe()} ({reason})") from error


def gather_rows(rows: Tensor, ranks: Ranks) -> Tensor:
    """The rows of all ranks [W b, D], in rank order."""
    if ranks.world_size == 1:
        return rows
    gathered = rows.new_empty((ranks.world_size * len(rows), *rows.shape[1:]))
    _all_gather(gathered, rows.contiguous())
    return gathered


def upload(value: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor to the device without waiting for it."""
    return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)


class KeyShuffle:
    """Hides from BatchNorm which keys belong to which queries (MoCo's ShuffleBN, for any number of processes).

    One permutation of the global batch, drawn from (seed, epoch, step) and equal on every rank, decides which rank and which
    statistics group encodes each key view, so the groups do not depend on the number of processes. Views are exchanged once
    (all-to-all, with gloo as with NCCL); the keys are gathered for the queue anyway, and put back in order there.

    Args:
        ranks: the processes.
        seed: the run's seed.
    """

    def __init__(self, ranks: Ranks, seed: int) -> None:
        self.ranks = ranks
        self.seed = seed

    def permutation(self, epoch: int, step: int, images: int) -> np.ndarray:
        """int64 [images]: row i of the shuffled global batch is image permutation[i]."""
        return keyed_generator(self.seed, "key shuffle", epoch, step).permutation(images)

    def scatter(self, views: Tensor, permutation: np.ndarray) -> Tensor:
        """This rank's share of the shuffled batch: [b, 3, H, W] in channels_last."""
        rank, size, local = self.ranks.rank, self.ranks.world_size, len(views)
        rows = views.permute(0, 2, 3, 1)  # dense rows, so that indexing keeps channels_last
        if size == 1:
            return rows[self._index(permutation)].permute(0, 3, 1, 2)
        wanted = permutation.reshape(size, local)
        outgoing = [index[index // local == rank] - rank * local for index in wanted]
        incoming = [np.flatnonzero(wanted[rank] // local == source) for source in range(size)]
        sent = rows[self._index(np.concatenate(outgoing))].contiguous()
        received = torch.empty_like(rows, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, sent, [len(index) for index in incoming], [len(index) for index in outgoing])
        back = np.empty(local, np.int64)
        back[np.concatenate(incoming)] = np.arange(local)
        return received[self._index(back)].permute(0, 3, 1, 2)

    def restore(self, keys: Tensor, permutation: np.ndarray) -> Tensor:
        """The gathered keys of the shuffled batch [B, D], in the order of the images."""
        inverse = np.empty_like(permutation)
        inverse[permutation] = np.arange(len(permutation))
        return keys[self._index(inverse)]

    def _index(self, values: np.ndarray) -> Tensor:
        return upload(torch.from_numpy(np.ascontiguousarray(values)), self.ranks.device)
