"""What the DALI and the PyTorch loader have in common: requests in, normalized views out, in order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastuft.data.strong import StrongConfig, StrongParameters
from fastuft.data.views import ViewParameters

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processor time, and of the period they are for


@dataclass(frozen=True)
class Request:
    """One batch to make.

    Args:
        paths: [n] files.
        views: parameters of each view of them, in order.
        index: int64 [n] which files of the stream they are; handed back with the result.
        strong: what is done to the last view after its crop, where the spec has a strong view.
    """

    paths: list[str]
    views: tuple[ViewParameters, ...]
    index: np.ndarray
    strong: StrongParameters | None = None


@dataclass(frozen=True)
class ViewSpec:
    """How views are made.

    Args:
        size: side of the result, pixels.
        num_views: views of each image.
        color: whether the color jitter is part of the pipeline.
        blur: whether the blur is.
        rotation: whether the rotation is.
        mean: of the network's inputs, for pixels in [0, 1].
        std: likewise.
        batch_size: largest batch.
        device: where the views are wanted.
        dtype: float32, float16 or bfloat16.
        threads: decoding threads; 0 takes the processors of this process.
        prefetch: batches made ahead.
        hw_decoder_load: share of JPEGs for a GPU's hardware decoder.
        largest: (width, height) to reserve memory for in a GPU's hardware decoder; larger images still work.
        strong: RandAugment and Cutout of the last view; None has no strong view.
    """

    size: int
    num_views: int
    color: bool
    blur: bool
    rotation: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batch_size: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    threads: int = 0
    prefetch: int = 2
    hw_decoder_load: float = 0.9
    largest: tuple[int, int] = (0, 0)
    strong: StrongConfig | None = None

    @property
    def num_threads(self) -> int:
        """Threads to use; the processes of one machine, one a GPU, share its processors."""
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self.threads or max(1, processors() // local_ranks)


def processors() -> int:
    """Processors that this process may use: those it may run on, at most its container's quota."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        return min(here, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups of version 2, or "max"
        return here


class DecodeError(RuntimeError):
    """Making the requests under way failed, most often because one file cannot be decoded."""

    def __init__(self, paths: list[str], cause: BaseException) -> None:
        named = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
        super().__init__(f"{cause}\nThe images under way were: {named}")
        self.paths = paths


class Backend(Protocol):
    """Makes views from requests."""

    def run(self, requests: Iterator[Request]) -> Iterator[tuple[Request, list[Tensor]]]:
        """(request, [one [n, 3, size, size] channels_last tensor a view]) for each request, in order.

        Raises:
            DecodeError: with the files among which the undecodable one is.
        """
        ...

    def parses(self, path: str) -> bool:
        """Whether this backend's decoder understands a file's header."""
        ...

    def undecodable(self, paths: list[str]) -> list[str]:
        """Those files that this backend cannot decode, each tried alone."""
        ...

    def close(self) -> None:
        """Give back threads and memory."""
        ...
