"""What the DALI and the PyTorch loader have in common: requests in, normalised views out, in order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastuft.data.views import ViewParameters


@dataclass(frozen=True)
class Request:
    """One batch to make: files, the parameters of each view of them, and what the caller wants to know again.

    Args:
        paths: [n] files.
        views: parameters of each view, in order.
        tag: handed back with the result.
    """

    paths: list[str]
    views: tuple[ViewParameters, ...]
    tag: Any = None


@dataclass(frozen=True)
class ViewSpec:
    """How views are made.

    Args:
        size: side of the result, pixels.
        num_views: views of each image.
        colour: whether the colour jitter is part of the pipeline.
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
    """

    size: int
    num_views: int
    colour: bool
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

    @property
    def num_threads(self) -> int:
        """Threads to use; one process a GPU shares the machine with its neighbours."""
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)


class DecodeError(RuntimeError):
    """Some file of the requests under way could not be decoded."""

    def __init__(self, paths: list[str], cause: BaseException) -> None:
        super().__init__(str(cause))
        self.paths = paths


class Backend(Protocol):
    """Makes views from requests."""

    def run(self, requests: Iterator[Request]) -> Iterator[tuple[Request, list[Tensor]]]:
        """(request, [one [n, 3, size, size] channels_last tensor a view]) for each request, in order.

        Raises:
            DecodeError: with the files among which the undecodable one is.
        """
        ...

    def close(self) -> None:
        """Give back threads and memory."""
        ...
