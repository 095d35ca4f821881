"""Options of embedding images and of searching the embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastuft.config.checks import AtLeast0, AtLeast1, PathName, Threads, check_values
from fastuft.config.data import DataConfig


@dataclass(frozen=True)
class EmbedConfig:
    """Write a checkpoint's features of images to a file.

    Args:
        images: folders, list files or images.
        checkpoint: exported backbone, run folder, or any checkpoint that ``init`` takes.
        out: file to write: .npz, or .parquet (needs the extra fastuft[parquet]).
        arch: the network, if the checkpoint does not name it.
        stem: the stem, if the checkpoint does not name it.
        init_key: prefix of one of several backbones in the checkpoint (encoder_k, teacher); none takes the one that was
            trained by gradients.
        init_channels: channels of its first convolution; auto is RGB or what the layout says, bgr and gray are converted.
        size: side of the network's input, pixels; 0 takes the network's own.
        resize: shorter side before the center crop; 0 means size * 256 / 224.
        batch_size: images per batch.
        part_size: images per part; parts are saved along the way, and the same command continues after the last whole one.
        on_bad_file: error names the file and stops; skip leaves it out and counts it.
        suffixes: suffixes of image files in folders, as in data.suffixes of a run.
        device: auto, cuda or cpu.
        precision: auto is bf16 on a GPU and fp32 on a CPU.
        loader: dali, torch or auto.
        threads: decoding threads; 0 takes the processors available to this process.
    """

    images: list[str]
    checkpoint: PathName
    out: PathName = "embeddings.npz"
    arch: str | None = None
    stem: Literal["imagenet", "small"] | None = None
    init_key: str | None = None
    init_channels: Literal["auto", "rgb", "bgr", "gray"] = "auto"
    size: AtLeast0 = 0
    resize: AtLeast0 = 0
    batch_size: AtLeast1 = 256
    part_size: AtLeast1 = 8192
    on_bad_file: Literal["error", "skip"] = "error"
    suffixes: tuple[str, ...] = DataConfig.suffixes
    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    loader: Literal["auto", "dali", "torch"] = "auto"
    threads: Threads = 0

    def __post_init__(self) -> None:
        check_values(self)
        if not self.images:
            raise ValueError("images is empty; name at least one folder, list file or image")


@dataclass(frozen=True)
class SearchConfig:
    """Find the images whose features are nearest to those of a query, by cosine similarity.

    Args:
        query: images to look for, or a folder of them.
        in_: file of embeddings written by `fastuft embed`.
        top: images to print for each query.
        checkpoint: the checkpoint that made the embeddings, if it has moved.
        suffixes: suffixes of image files in folders, as in data.suffixes of a run.
    """

    query: list[str]
    in_: PathName
    top: AtLeast1 = 10
    checkpoint: PathName | None = None
    suffixes: tuple[str, ...] = DataConfig.suffixes

    def __post_init__(self) -> None:
        check_values(self)
