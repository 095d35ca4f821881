"""Options of training images and their random views: ``data.*`` and ``augment.*``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastuft.config.checks import (
    AtLeast0,
    AtLeast1,
    AutoAtLeast2,
    AutoFraction,
    AutoSide,
    Fraction,
    Positive,
    Range,
    Span,
    Threads,
    check_values,
)


@dataclass(frozen=True)
class DataConfig:
    """Streams of training images.

    Args:
        batch_size: global batch size: images per step over all ranks.
        replay_fraction: share of the source that joins training (sparse source data replaying).
        replay_seed: seed of the one fixed draw of that share.
        replay_mode: union (one shuffled pass over target and replayed images) or balanced (a fixed source share per batch).
        replay_share: source share of each batch if ``replay_mode`` is balanced.
        replay_cache: folder to copy the drawn source images to once (fast local disk).
        loader: dali, torch, or auto (DALI if installed, otherwise the PyTorch loader; one line says so).
        threads: decoding threads; 0 derives the number from the machine.
        prefetch: batches prepared ahead.
        hw_decoder_load: share of JPEGs given to the GPU's hardware decoder.
        on_bad_file: error names the file and stops; skip replaces it with a good one and counts it.
        drop_last: drop the last partial batch of an epoch (required by ``split`` statistics).
        max_megapixels: size of the largest image that is decoded, in megapixels.
        read_timeout: seconds that reading one file may take; a file that takes longer counts as bad.
        readers: threads that read images ahead of the decoder; 0 starts with 16, or 64 if they come over a
            network, and adds more, up to 256, while latency and rate require it.
        suffixes: suffixes of images in folders and shards, in any case; others that Pillow decodes may be added (.tif,
            .gif), and "" for names without a suffix.
    """

    batch_size: AutoAtLeast2 = 256
    replay_fraction: AutoFraction = 0.1
    replay_seed: int = 0
    replay_mode: Literal["union", "balanced"] = "union"
    replay_share: Fraction = 0.5
    replay_cache: str | None = None
    loader: Literal["auto", "dali", "torch"] = "auto"
    threads: Threads = 0
    prefetch: AtLeast1 = 2
    hw_decoder_load: Fraction = 0.9
    on_bad_file: Literal["error", "skip"] = "error"
    drop_last: bool = True
    max_megapixels: Positive = 180.0
    read_timeout: Positive = 60.0
    readers: AtLeast0 = 0
    suffixes: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

    def __post_init__(self) -> None:
        check_values(self, "data")


@dataclass(frozen=True)
class AugmentConfig:
    """The random views of a training image (as in MoCoV2; ``fastuft.data.SMALL_IMAGES`` suits 32 px).

    Args:
        size: side of the square crop, pixels.
        crop_scale: area range of the random resized crop.
        crop_ratio: aspect range of the random resized crop.
        brightness: jitter strength.
        contrast: jitter strength.
        saturation: jitter strength.
        hue: jitter strength.
        jitter_p: probability of the color jitter.
        grayscale_p: probability of conversion to gray.
        blur_sigma: range of the Gaussian blur's sigma, pixels.
        blur_p: probability of the blur.
        flip_p: probability of the horizontal flip.
        rotation: rotations are drawn from +-rotation degrees; 0 turns them off.
    """

    size: AutoSide = 224
    crop_scale: Annotated[tuple[float, float], Span(top=1.0)] = (0.2, 1.0)
    crop_ratio: Annotated[tuple[float, float], Span()] = (3 / 4, 4 / 3)
    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.4
    hue: Annotated[float, Range(0.0, 0.5)] = 0.1
    jitter_p: Fraction = 0.8
    grayscale_p: Fraction = 0.2
    blur_sigma: Annotated[tuple[float, float], Span()] = (0.1, 2.0)
    blur_p: Fraction = 0.5
    flip_p: Fraction = 0.5
    rotation: Annotated[float, Range(0.0, 180.0)] = 0.0

    def __post_init__(self) -> None:
        check_values(self, "augment")
