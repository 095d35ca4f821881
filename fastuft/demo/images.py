"""Source and target images of the demo, written as PNG files in class folders.

Source: the 62 letters and digits, rendered with the fonts bundled with Matplotlib under a random affine map, blur and noise.
Target: the 1,797 real handwritten digits of scikit-learn's ``load_digits`` (8x8, enlarged to the same size). Both are white on
black. Class folders are only for evaluation; training reads the files without their labels.
"""

from __future__ import annotations

import json
import string
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from fastuft.atomic import write_whole
from fastuft.randomness import keyed_generator

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
FONT_STEMS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)
NUM_TRAIN_DIGITS = 500
SIDE = 32  # side of every image, pixels
SEED = 0  # seed of the glyphs and of the split of the digits


@dataclass(frozen=True)
class DemoFolders:
    """The folders of the demo's images: ``source`` (glyphs), ``train`` and ``test`` (digits)."""

    source: str
    train: str
    test: str


def class_name(character: str) -> str:
    """A folder name that is unique even on file systems that ignore case."""
    kind = "digit" if character.isdigit() else "upper" if character.isupper() else "lower"
    return f"{kind}_{character.lower()}"


def render_glyph(character: str, font_path: str, side: int, generator: np.random.Generator) -> Image.Image:
    """One grayscale glyph [side, side] under a random affine map, blur and noise."""
    scale = 4  # drawn larger, so that the affine map does not alias
    center = side * scale / 2
    # Scaled by the character's own extent, so that it fills most of the image, as handwritten digits do.
    left, top, right, bottom = ImageFont.truetype(font_path, 100).getbbox(character, anchor="mm")
    extent = max(right - left, bottom - top)
    font = ImageFont.truetype(font_path, round(100 * side * scale * generator.uniform(0.7, 0.95) / extent))
    canvas = Image.new("L", (side * scale, side * scale))
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = draw.textbbox((center, center), character, font=font, anchor="mm")
    anchor = (2 * center - (left + right) / 2, 2 * center - (top + bottom) / 2)
    draw.text(anchor, character, fill=255, font=font, anchor="mm")
    angle, shear = np.deg2rad(generator.uniform(-15, 15)), generator.uniform(-0.25, 0.25)
    stretch = generator.uniform(0.85, 1.2, size=2)
    rotate = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotate @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag(stretch)
    offset = center + generator.uniform(-2, 2, size=2) * scale - matrix @ np.array([center, center])
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    blur = ImageFilter.GaussianBlur(scale * generator.uniform(0.2, 2.0))
    pixels = np.asarray(canvas.filter(blur).resize((side, side), Image.Resampling.BOX), dtype=np.float32)
    noisy = pixels * generator.uniform(0.7, 1.0) + generator.normal(0, generator.uniform(0, 14), pixels.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def write_demo_images(root: str | Path, *, num_glyphs: int) -> DemoFolders:
    """Write the demo's folders below ``root``, once; a finished set with the same parameters is left unchanged.

    Args:
        root: folder to write to; ``source``, ``train`` and ``test`` are created in it.
        num_glyphs: source images, spread evenly over the 62 characters.
    """
    import matplotlib
    from sklearn.datasets import load_digits

    root = Path(root)
    folders = DemoFolders(*(str(root / name) for name in ("source", "train", "test")))
    done = root / "images.json"
    stamp = {"num_glyphs": num_glyphs, "side": SIDE, "seed": SEED, **asdict(folders)}
    if done.exists() and json.loads(done.read_text(encoding="utf-8")) == stamp:
        return folders

    fonts = [str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{stem}.ttf") for stem in FONT_STEMS]
    for character in CHARACTERS:
        Path(folders.source, class_name(character)).mkdir(parents=True, exist_ok=True)
    for index in range(num_glyphs):
        character = CHARACTERS[index % len(CHARACTERS)]
        generator = keyed_generator(SEED, "glyph", index)
        glyph = render_glyph(character, fonts[int(generator.integers(len(fonts)))], SIDE, generator)
        glyph.save(Path(folders.source, class_name(character), f"{index:05d}.png"), compress_level=1)

    digits = load_digits()
    order = keyed_generator(SEED, "digits").permutation(len(digits.target))
    for rank, index in enumerate(order):
        label = int(digits.target[index])
        folder = Path(folders.train if rank < NUM_TRAIN_DIGITS else folders.test, class_name(str(label)))
        folder.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray((digits.images[index] * (255 / 16)).astype(np.uint8))
        pixels.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.png", compress_level=1)
    write_whole(done, json.dumps(stamp).encode())
    return folders
