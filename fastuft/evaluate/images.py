"""Images decoded once and kept as uint8, and random crops of them for few-shot finetuning."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from fastuft.data import CROP_DRAWS, crop_regions, open_rgb

_THUMBNAIL = 64  # pixels


def decode(paths: Sequence[str], shorter: int) -> list[Tensor]:
    """Images as uint8 [3, H, W] whose shorter side is ``shorter``, in order, decoded by a few threads."""

    def one(path: str) -> Tensor:
        image = open_rgb(path)
        scale = shorter / min(image.size)
        if scale != 1:
            width, height = (max(shorter, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, paths))


def random_views(
    images: Sequence[Tensor],
    size: int,
    generator: np.random.Generator,
    *,
    scale: tuple[float, float],
    flip_p: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """One random resized crop (aspect 3/4 to 4/3) and horizontal flip of each image, normalized.

    A ``scale`` of (1, 1) crops nothing from a square image. images: uint8 [3, H, W] each. Returns [n, 3, size, size]
    float32 in channels_last on the images' device.
    """
    ratio = (1.0, 1.0) if scale[0] == 1 else (3 / 4, 4 / 3)
    u = generator.random((len(images), CROP_DRAWS + 1))
    sizes = np.array([(image.shape[2], image.shape[1]) for image in images])
    regions = zip(*crop_regions(sizes, u[:, :-1], scale, ratio), strict=True)
    views = []
    for image, (start, end), flip in zip(images, regions, u[:, -1] < flip_p, strict=True):
        (top, left), (bottom, right) = start.astype(int), end.astype(int)
        part = image[None, :, top:bottom, left:right].float()
        if part.shape[2:] != (size, size):
            part = F.interpolate(part, (size, size), mode="bilinear", align_corners=False, antialias=True)
        views.append(part.flip(3) if flip else part)
    batch = torch.cat(views).contiguous(memory_format=torch.channels_last)
    return normalize(batch, mean, std)


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixels / 255 - mean) / std per channel; pixels [n, 3, H, W] in 0..255."""
    # Asynchronous copies of a few bytes: making a device tensor from a sequence would wait for all work on the GPU.
    shift, factor = (torch.tensor(v).view(1, 3, 1, 1).to(pixels.device, non_blocking=True) for v in (mean, std))
    return (pixels / 255 - shift) / factor


def thumbnail_png(path: str) -> NDArray[np.uint8]:
    """The image's center square at 64 pixels as the bytes of a PNG file, uint8 [n]."""
    image = ImageOps.fit(open_rgb(path), (_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)
