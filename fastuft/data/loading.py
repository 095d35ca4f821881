"""How to load images: device, format and loader."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastuft.config import DataConfig
from fastuft.data.decoding import MAX_MEGAPIXELS
from fastuft.data.reading import READ_TIMEOUT
from fastuft.messages import note

Loader = Literal["auto", "dali", "torch"]
Triple = tuple[float, float, float]
CPU = torch.device("cpu")

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processor time, and of the period that they refer to


@dataclass(frozen=True)
class Loading:
    """How to load the images of a stream.

    Args:
        mean: mean of the network's inputs, for pixels in [0, 1].
        std: their standard deviation.
        device: device of the images; a CUDA device also decodes.
        dtype: float32, float16 or bfloat16.
        loader: auto, dali or torch.
        threads: decoding threads; 0 takes the processors available to this process.
        prefetch: batches prepared ahead.
        hw_decoder_load: share of JPEGs for a GPU's hardware decoder.
        max_megapixels: largest image that is decoded.
        on_bad_file: error names the file and stops; with skip, training streams replace it with a good file, and
            evaluation omits it.
        read_timeout: seconds that reading one file may take; one that takes longer is bad.
        readers: threads that read files ahead of the decoder; 0 starts with 16, or 64 if images come over a
            network, and adds more while latency and rate require it.
    """

    mean: Triple
    std: Triple
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    loader: Loader = "auto"
    threads: int = 0
    prefetch: int = 2
    hw_decoder_load: float = 0.9
    max_megapixels: float = MAX_MEGAPIXELS
    on_bad_file: Literal["error", "skip"] = "error"
    read_timeout: float = READ_TIMEOUT
    readers: int = 0

    @classmethod
    def of(
        cls,
        data: DataConfig,
        *,
        mean: Triple,
        std: Triple,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> Loading:
        """The settings of a configuration, for one network on one device."""
        return cls(
            mean=mean,
            std=std,
            device=device,
            dtype=dtype,
            loader=data.loader,
            threads=data.threads,
            prefetch=data.prefetch,
            hw_decoder_load=data.hw_decoder_load,
            max_megapixels=data.max_megapixels,
            on_bad_file=data.on_bad_file,
            read_timeout=data.read_timeout,
            readers=data.readers,
        )

    @property
    def num_threads(self) -> int:
        """Threads to use; the processes of one machine (one per GPU) share its processors."""
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self.threads or max(1, processors() // local_ranks)


def processors() -> int:
    """Processors available to this process: those that it may run on, up to its container's quota."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text(encoding="utf-8").split()
        return min(here, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups of version 2, or "max"
        return here


def resolve_loader(loader: Loader) -> Literal["dali", "torch"]:
    """dali or torch; ``auto`` takes DALI if it is installed, and otherwise says once that it is not.

    Raises:
        ValueError: ``dali``, but DALI is not installed.
    """
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if loader == "torch" or (loader == "auto" and not installed):
        if loader == "auto":
            note("DALI is not installed: images go through the slower PyTorch loader.")
        return "torch"
    if not installed:
        raise ValueError(
            "data.loader='dali' needs DALI; pip install nvidia-dali-cuda130 (or -cuda120), or set data.loader=torch"
        )
    return "dali"
