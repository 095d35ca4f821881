"""The random parameters of each view, drawn on the host from (seed, epoch, global position, view).

The decoding backends get them as plain arrays, so crops, jitter, blur and flips do not depend on ranks, threads, batch size,
backend or restarts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastuft.config import AugmentConfig
from fastuft.randomness import keyed_generator

Floats = NDArray[np.float32]

_BLOCK = 1024  # positions that share a generator; unrelated to the batch size
_TRIES = 10  # proposals of a random resized crop, as in the usual definition
CROP_DRAWS = 2 * _TRIES + 2  # uniform draws per crop
_DRAWS = CROP_DRAWS + 10

# Small images (32 px): mild crops, a little rotation, no flip, so that digits and glyphs keep their meaning.
SMALL_IMAGES = AugmentConfig(
    size=32,
    crop_scale=(0.4, 1.0),
    brightness=0.4,
    contrast=0.4,
    saturation=0.0,
    hue=0.0,
    grayscale_p=0.0,
    blur_sigma=(0.1, 1.0),
    flip_p=0.0,
    rotation=15.0,
)


@dataclass(frozen=True)
class ViewParameters:
    """The parameters of each image of a batch, in the order of application: crop and resize, rotate, color, blur, flip.

    Args:
        roi_start: (y, x) of the crop's first corner in pixels of the upright original, [n, 2].
        roi_end: (y, x) of the opposite corner, [n, 2].
        angle: rotation, degrees counter-clockwise, [n].
        brightness: factor, [n].
        contrast: factor around mid-gray, [n].
        saturation: factor, [n]; 0 is grayscale.
        hue: rotation of hue, degrees, [n].
        sigma: sigma of the Gaussian blur, pixels, [n]; 0 means no blur.
        flip: 1 mirrors horizontally, [n].
    """

    roi_start: Floats
    roi_end: Floats
    angle: Floats
    brightness: Floats
    contrast: Floats
    saturation: Floats
    hue: Floats
    sigma: Floats
    flip: NDArray[np.int32]

    @property
    def twisted(self) -> NDArray[np.bool_]:
        """Whether brightness, contrast, saturation or hue change anything, [n]."""
        twisted: NDArray[np.bool_] = (
            (self.brightness != 1) | (self.contrast != 1) | (self.saturation != 1) | (self.hue != 0)
        )
        return twisted


@lru_cache(maxsize=64)
def _block(seed: int, epoch: int, view: int | str, block: int, draws: int) -> np.ndarray:
    return keyed_generator(seed, "view", view, epoch, block).random((_BLOCK, draws))


def uniforms(seed: int, epoch: int, view: int | str, positions: np.ndarray, draws: int = _DRAWS) -> np.ndarray:
    """Uniform draws [n, draws] of one view at global positions of an epoch."""
    blocks = positions // _BLOCK
    out = np.empty((len(positions), draws))
    for block in np.unique(blocks):
        rows = blocks == block
        out[rows] = _block(seed, epoch, view, int(block), draws)[positions[rows] % _BLOCK]
    return out


def _factor(strength: float, u: np.ndarray, applied: np.ndarray) -> Floats:
    return np.where(applied, 1 + strength * (2 * u - 1), 1.0).astype(np.float32)


def crop_regions(
    sizes: np.ndarray, u: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Floats, Floats]:
    """Random resized crops: area uniform in ``scale``, log aspect uniform in ``ratio``, position uniform.

    The first of ten proposals that fits is used, otherwise the largest centered crop with an allowed aspect.

    Args:
        sizes: int [n, 2] width and height of the images.
        u: uniform draws [n, CROP_DRAWS].
        scale: smallest and largest share of the area.
        ratio: smallest and largest aspect, width over height.

    Returns:
        (start, end), each (y, x) in whole pixels, [n, 2].
    """
    width, height = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    low, high = scale
    area = width * height * (low + (high - low) * u[:, :_TRIES])
    log_low, log_high = np.log(ratio)
    aspect = np.exp(log_low + (log_high - log_low) * u[:, _TRIES : 2 * _TRIES])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.argmax(1)[:, None]
    w, h = np.take_along_axis(w, first, 1), np.take_along_axis(h, first, 1)
    none = ~fits.any(1, keepdims=True)
    allowed = np.clip(width / height, *ratio)
    w = np.where(none, np.maximum(1, np.rint(np.minimum(width, height * allowed))), w)
    h = np.where(none, np.maximum(1, np.rint(np.minimum(height, width / allowed))), h)
    left = np.where(none, np.floor((width - w) / 2), np.floor((width - w + 1) * u[:, -2:-1]))
    top = np.where(none, np.floor((height - h) / 2), np.floor((height - h + 1) * u[:, -1:]))
    start = np.concatenate([top, left], 1).astype(np.float32)
    return start, np.concatenate([top + h, left + w], 1).astype(np.float32)


def draw_views(augment: AugmentConfig, sizes: np.ndarray, u: np.ndarray) -> ViewParameters:
    """The parameters of one random view of each image.

    Args:
        augment: strengths and probabilities.
        sizes: int [n, 2] width and height of the upright originals.
        u: uniform draws [n, draws].
    """
    first, last = crop_regions(sizes, u[:, :CROP_DRAWS], augment.crop_scale, augment.crop_ratio)
    rest = u[:, CROP_DRAWS:]
    jitter = rest[:, 0] < augment.jitter_p
    gray = rest[:, 5] < augment.grayscale_p
    saturation = np.where(gray, np.float32(0), _factor(augment.saturation, rest[:, 3], jitter))
    blur = rest[:, 6] < augment.blur_p
    sigma_low, sigma_high = augment.blur_sigma
    return ViewParameters(
        roi_start=first,
        roi_end=last,
        angle=(augment.rotation * (2 * rest[:, 8] - 1)).astype(np.float32),
        brightness=_factor(augment.brightness, rest[:, 1], jitter),
        contrast=_factor(augment.contrast, rest[:, 2], jitter),
        saturation=saturation.astype(np.float32),
        hue=np.where(jitter, 360 * augment.hue * (2 * rest[:, 4] - 1), 0).astype(np.float32),
        sigma=np.where(blur, sigma_low + (sigma_high - sigma_low) * rest[:, 7], 0).astype(np.float32),
        flip=(rest[:, 9] < augment.flip_p).astype(np.int32),
    )


def center_views(sizes: np.ndarray, size: int, resize: int) -> ViewParameters:
    """The evaluation view: shorter side resized to ``resize``, center crop of ``size``, as one region of the original.

    Sides and corners are rounded to whole pixels of the resized image, as torchvision's Resize and CenterCrop do.

    Args:
        sizes: int [n, 2] width and height of the upright originals.
        size: side of the result, pixels.
        resize: shorter side that the crop is taken from; at least ``size``.
    """
    original = sizes[:, ::-1].astype(np.int64)  # height, width
    resized = resize * original // original.min(1, keepdims=True)
    scale = original / resized
    corner = np.rint((resized - size) / 2)
    n = len(sizes)
    one, zero = np.ones(n, np.float32), np.zeros(n, np.float32)
    return ViewParameters(
        roi_start=(corner * scale).astype(np.float32),
        roi_end=((corner + size) * scale).astype(np.float32),
        angle=zero,
        brightness=one,
        contrast=one,
        saturation=one,
        hue=zero,
        sigma=zero,
        flip=np.zeros(n, np.int32),
    )


def color_matrix(brightness: float, contrast: float, saturation: float, hue: float) -> tuple[np.ndarray, float]:
    """(matrix [3, 3], offset) of the color jitter on RGB in [0, 255]: hue and saturation in YIQ, then contrast around 128
    and brightness, the same map as DALI's ``color_twist``.
    """
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    to_rgb = np.array([[1.0, 0.956, 0.621], [1.0, -0.272, -0.647], [1.0, -1.107, 1.705]])
    angle = math.radians(hue)
    turn = np.array([[1, 0, 0], [0, math.cos(angle), math.sin(angle)], [0, -math.sin(angle), math.cos(angle)]])
    stretch = np.diag([1, saturation, saturation])
    matrix = to_rgb @ turn @ stretch @ to_yiq
    return brightness * contrast * matrix, brightness * (128 - 128 * contrast)
