"""The PyTorch backend: the same views from the same parameters, made by Pillow and tensor operations on the CPU."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional as F

from fastuft.data.backend import DecodeError, Request, ViewSpec
from fastuft.data.bad import BadImageError
from fastuft.data.decoding import EncodedImage, decode_rgb
from fastuft.data.strong import FILL, StrongConfig, StrongParameters, magnitude
from fastuft.data.views import ViewParameters, color_matrix


def gaussian_blur(pixels: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of [3, H, W] with a window of 3 sigma on each side; borders are mirrored."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = pixels[:, None]
    for shape, pad in (((1, 1, -1, 1), (0, 0, radius, radius)), ((1, 1, 1, -1), (radius, radius, 0, 0))):
        x = F.conv2d(F.pad(x, pad, mode="reflect"), kernel.view(shape))
    return x[:, 0]


def distort(image: Image.Image, name: str, value: float) -> Image.Image:
    """One operator of RandAugment by Pillow; ``value`` is in the units of ``fastuft.data.strong.RANGES``."""
    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "sharpness": ImageEnhance.Sharpness,
    }
    # Where each pixel of the result comes from: x = a x' + b y' + c, y = d x' + e y' + f.
    maps = {
        "shear_x": (1, -value, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, -value, 1, 0),
        "translate_x": (1, 0, -value * image.width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -value * image.height),
    }
    fill = (FILL, FILL, FILL)
    if name in enhancers:
        return enhancers[name](image).enhance(1 + value)
    if name in maps:
        return image.transform(
            image.size, Image.Transform.AFFINE, maps[name], Image.Resampling.BILINEAR, fillcolor=fill
        )
    if name == "rotate":
        return image.rotate(value, Image.Resampling.BILINEAR, fillcolor=fill)
    if name == "posterize":
        return ImageOps.posterize(image, max(1, round(value)))
    if name == "solarize":
        return ImageOps.solarize(image, math.ceil(value))
    if name == "auto_contrast":
        return ImageOps.autocontrast(image)
    return ImageOps.equalize(image) if name == "equalize" else image


def strong_view(image: Image.Image, config: StrongConfig, drawn: StrongParameters, row: int) -> Image.Image:
    """RandAugment and Cutout of one cropped image."""
    for number in range(config.num_ops):
        name = config.ops[drawn.op[row, number]]
        image = distort(image, name, magnitude(name, drawn.magnitude_bin[row, number], drawn.negate[row, number]))
    (top, left), (height, width) = drawn.erase_start[row].astype(int), drawn.erase_shape[row].astype(int)
    if height and width:
        image = image.copy()
        image.paste((FILL, FILL, FILL), (left, top, left + width, top + height))
    return image


def make_view(
    image: Image.Image, view: ViewParameters, row: int, spec: ViewSpec, strong: StrongParameters | None = None
) -> Tensor:
    """One normalized view [3, size, size] of an upright RGB image."""
    top, left = view.roi_start[row]
    bottom, right = view.roi_end[row]
    box = (float(left), float(top), float(right), float(bottom))
    cropped = image.resize((spec.size, spec.size), Image.Resampling.BILINEAR, box=box)
    if spec.rotation and view.angle[row]:
        cropped = cropped.rotate(float(view.angle[row]), Image.Resampling.BILINEAR)
    if strong is not None:
        assert spec.strong is not None
        cropped = strong_view(cropped, spec.strong, strong, row)
    x = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float()
    if spec.color and view.twisted[row]:
        matrix, offset = color_matrix(
            *(float(a[row]) for a in (view.brightness, view.contrast, view.saturation, view.hue))
        )
        x = torch.einsum("ij,jhw->ihw", torch.from_numpy(matrix).float(), x) + offset
        x = x.clamp_(0, 255)
    if spec.blur and view.sigma[row] > 0:
        x = gaussian_blur(x, float(view.sigma[row]))
    if view.flip[row]:
        x = x.flip(2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.loading.mean, spec.loading.std))
    return (x / 255 - mean) / std


class TorchBackend:
    """Makes views with a pool of threads, ``prefetch`` batches ahead of the consumer."""

    def __init__(self, spec: ViewSpec) -> None:
        self.spec = spec
        self._pool = ThreadPoolExecutor(spec.loading.num_threads)

    def _sample(self, request: Request, row: int) -> list[Tensor]:
        image = decode_rgb(request.images[row])
        plain = [None] * (len(request.views) - 1)
        return [
            make_view(image, view, row, self.spec, strong)
            for view, strong in zip(request.views, [*plain, request.strong], strict=True)
        ]

    def run(self, requests: Iterator[Request]) -> Iterator[tuple[Request, list[Tensor]]]:
        """See :class:`fastuft.data.backend.Backend`."""
        under_way: deque[tuple[Request, list[Future[list[Tensor]]]]] = deque()

        def take() -> None:
            request = next(requests, None)
            if request is not None:
                jobs = [self._pool.submit(self._sample, request, row) for row in range(len(request.images))]
                under_way.append((request, jobs))

        for _ in range(1 + self.spec.loading.prefetch):
            take()
        while under_way:
            request, jobs = under_way.popleft()
            try:
                samples = [job.result() for job in jobs]
            except BadImageError as error:
                raise DecodeError([request], error) from error
            take()
            yield request, [self._collate([sample[view] for sample in samples]) for view in range(len(request.views))]

    def _collate(self, views: list[Tensor]) -> Tensor:
        batch = torch.stack(views).to(self.spec.loading.dtype, memory_format=torch.channels_last)
        if self.spec.loading.device.type == "cuda":
            batch = batch.pin_memory()  # a copy from pageable memory would make the host wait
        return batch.to(self.spec.loading.device, non_blocking=True)

    def understands(self, image: EncodedImage) -> bool:
        """See :class:`fastuft.data.backend.Backend`; Pillow's size is compared when the image is decoded."""
        return True

    def decodes(self, images: Sequence[EncodedImage]) -> list[bool]:
        """See :class:`fastuft.data.backend.Backend`."""

        def decodes(image: EncodedImage) -> bool:
            try:
                decode_rgb(image)
            except BadImageError:
                return False
            return True

        return list(self._pool.map(decodes, images))

    def close(self) -> None:
        """See :class:`fastuft.data.backend.Backend`."""
        self._pool.shutdown(cancel_futures=True)
