"""Each operator compared with torchvision's at the same parameters: the figures of docs/augmentations.md."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from stream_cases import plain

from fastuft.config import AugmentConfig
from fastuft.data import EvalStream, open_rgb
from fastuft.data.backend import Request, ViewSpec
from fastuft.data.feed import make_backend
from fastuft.data.views import draw_views, uniforms

transforms = pytest.importorskip("torchvision.transforms.functional", reason="torchvision is not installed")
samples = pytest.importorskip("sklearn.datasets")

COUNT, SIZE = 64, 224


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Crops of two photographs, 500 x 375."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(pixels) for pixels in samples.load_sample_images().images]
    paths = []
    for index in range(COUNT):
        picture = pictures[index % 2]
        left, top = int(generator.integers(0, picture.width - 499)), int(generator.integers(0, picture.height - 374))
        paths.append(str(folder / f"{index:02d}.jpg"))
        picture.crop((left, top, left + 500, top + 375)).save(paths[-1], quality=90)
    return paths


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_decoding_agrees_with_torchvision(photos, loader):
    """The whole image, cropped to a square without resizing."""
    io = pytest.importorskip("torchvision.io")
    ours = next(iter(EvalStream(photos, size=375, resize=375, loading=plain(loader))))[0] * 255
    theirs = torch.stack([transforms.center_crop(io.decode_image(path), [375, 375]) for path in photos])
    hold(DECODE, loader, (ours - theirs).abs().numpy())


DECODE, EVALUATION = "decode", "evaluation: resize 256, center crop 224"

# Which parameters of a view each case keeps; the others are set to do nothing.
CASES = {
    "crop and resize": ("roi_start", "roi_end"),
    "brightness": ("brightness",),
    "contrast": ("contrast",),
    "saturation": ("saturation",),
    "hue": ("hue",),
    "all four, torchvision in the same order": ("hue", "saturation", "contrast", "brightness"),
    "grayscale": ("gray",),
    "blur": ("sigma",),
    "mirror": ("flip",),
    "rotation": ("angle",),
}
NOTHING = {"angle": 0, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "sigma": 0, "flip": 0}


def stated():
    """{operator: {loader: mean absolute difference in gray levels}} of the table in docs/augmentations.md."""
    page = Path(__file__).parents[2] / "docs" / "augmentations.md"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines() if "|" in line]
    return {
        row[0]: {"dali": float(row[1]), "torch": float(row[3])}
        for row in rows
        if row[0] in {*CASES, DECODE, EVALUATION}
    }


def hold(operator, loader, difference):
    """Print a row and compare it with the page; other photographs and library versions differ a little."""
    mean, high = float(difference.mean()), float(np.quantile(difference, 0.99))
    print(f"| {operator} | {loader} | {mean:.2f} | {high:.1f} |")
    expected = stated()[operator][loader]
    assert abs(mean - expected) <= 0.25 * expected + 0.01


def parameters(case):
    augment = AugmentConfig(jitter_p=1.0, grayscale_p=0.0, blur_p=1.0, flip_p=1.0, rotation=15.0)
    view = draw_views(augment, np.tile([500, 375], (COUNT, 1)), uniforms(0, 0, 0, np.arange(COUNT)))
    kept = CASES[case]
    changes = {name: np.full_like(getattr(view, name), value) for name, value in NOTHING.items() if name not in kept}
    if "roi_start" not in kept:  # a crop of the very size: no resampling
        start = np.floor(np.array([375 - SIZE, 500 - SIZE]) * np.random.default_rng(1).random((COUNT, 2)))
        changes |= {"roi_start": start.astype(np.float32), "roi_end": (start + SIZE).astype(np.float32)}
    if "gray" in kept:
        changes["saturation"] = np.zeros(COUNT, np.float32)
    return dataclasses.replace(view, **changes)


def reference(case, image, view, row):
    """The same view by torchvision on Pillow images, as in MoCoV2's code."""
    top, left = (int(value) for value in view.roi_start[row])
    bottom, right = (int(value) for value in view.roi_end[row])
    x = transforms.resized_crop(image, top, left, bottom - top, right - left, [SIZE, SIZE])
    steps = {
        "angle": lambda: transforms.rotate(x, float(view.angle[row]), transforms.InterpolationMode.BILINEAR),
        "hue": lambda: transforms.adjust_hue(x, float(view.hue[row]) / 360),
        "saturation": lambda: transforms.adjust_saturation(x, float(view.saturation[row])),
        "contrast": lambda: transforms.adjust_contrast(x, float(view.contrast[row])),
        "brightness": lambda: transforms.adjust_brightness(x, float(view.brightness[row])),
        "gray": lambda: transforms.to_grayscale(x, 3),
        "sigma": lambda: x.filter(ImageFilter.GaussianBlur(float(view.sigma[row]))),
        "flip": lambda: transforms.hflip(x),
    }
    for name in CASES[case]:
        if name in steps:
            x = steps[name]()
    return np.asarray(x, np.float32)


@pytest.mark.parametrize("loader", ["dali", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_operators_agree_with_torchvision(photos, case, loader):
    view = parameters(case)
    kept = set(CASES[case])
    spec = ViewSpec(
        size=SIZE,
        num_views=1,
        color=bool(kept & {"brightness", "contrast", "saturation", "hue", "gray"}),
        blur="sigma" in kept,
        rotation="angle" in kept,
        batch_size=COUNT,
        loading=plain(loader, threads=1),
    )
    backend = make_backend(spec)
    ((_, (images,)),) = backend.run(iter([Request(photos, (view,), np.arange(COUNT))]))
    ours = images.permute(0, 2, 3, 1).numpy() * 255
    theirs = np.stack([reference(case, open_rgb(path), view, row) for row, path in enumerate(photos)])
    hold(case, loader, np.abs(ours - theirs))


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_evaluation_views_agree_with_torchvision(photos, loader):
    ours = next(iter(EvalStream(photos, size=SIZE, resize=256, loading=plain(loader))))[0]
    theirs = []
    for path in photos:
        resized = transforms.resize(open_rgb(path), [256])
        theirs.append(np.asarray(transforms.center_crop(resized, [SIZE, SIZE]), np.float32))
    hold(EVALUATION, loader, np.abs(ours.permute(0, 2, 3, 1).numpy() * 255 - np.stack(theirs)))
