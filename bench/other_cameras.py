"""Rewrites a folder of photographs as other cameras would have taken them: sets on which a pretrained network is weak.

    python bench/other_cameras.py photos/ night/ --camera night

``night`` has a sensor that counts few photons, ``thumbnail`` has 24 pixels on its shorter side, and ``lines`` leaves the edges
only. The folders below are kept, and an image's noise depends on nothing but its path below the folder.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from fastuft.data import list_images, open_rgb

PHOTONS = 8.0  # of a white pixel, on average
READ_NOISE = 1.0  # standard deviation, photons
GAMMA = 2.2
SHORTER_SIDE = 24  # of a thumbnail, pixels


def night(image: Image.Image, noise: np.random.Generator) -> Image.Image:
    """Grayscale, with the shot noise of few photons and the noise of reading them."""
    light = PHOTONS * (np.asarray(image.convert("L"), np.float64) / 255) ** GAMMA
    counted = noise.poisson(light) + noise.normal(0.0, READ_NOISE, light.shape)
    return Image.fromarray(np.uint8(255 * np.clip(counted / PHOTONS, 0, 1) ** (1 / GAMMA)))


def thumbnail(image: Image.Image, _: np.random.Generator) -> Image.Image:
    """Few pixels, enlarged to the original size."""
    share = SHORTER_SIDE / min(image.size)
    width, height = (max(1, round(side * share)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX).resize(image.size, Image.Resampling.BILINEAR)


def lines(image: Image.Image, _: np.random.Generator) -> Image.Image:
    """Edges as dark lines on white."""
    edges = image.convert("L").filter(ImageFilter.GaussianBlur(1)).filter(ImageFilter.FIND_EDGES)
    within = ImageOps.crop(edges, 1)  # the filter leaves the outermost pixels as they were
    return ImageOps.expand(ImageOps.invert(ImageOps.autocontrast(within)), 1, fill=255)


CAMERAS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "night": night,
    "thumbnail": thumbnail,
    "lines": lines,
}


def main() -> None:
    """Write one JPEG per photograph."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--camera", choices=sorted(CAMERAS), required=True)
    asked = parser.parse_args()
    for path in map(Path, list_images(str(asked.photographs))):
        name = path.relative_to(asked.photographs)
        written = (asked.out / name).with_suffix(".jpg")
        written.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(zlib.crc32(name.as_posix().encode()))
        CAMERAS[asked.camera](open_rgb(str(path)), noise).convert("RGB").save(written, quality=85)


if __name__ == "__main__":
    main()
