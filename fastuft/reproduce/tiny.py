"""The demo's digits in the published layouts of the paper's data sets, for running the whole grid on a CPU.

The 1,797 digits of scikit-learn are divided into four disjoint parts, one per data set, and written exactly as Caltech101,
Oxford-IIIT Pet, CIFAR-100 and Food-101 are published. The source is the demo's glyphs, in class folders.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fastuft.demo import write_demo_images
from fastuft.randomness import keyed_generator
from fastuft.reproduce.datasets import LAYOUTS

NAMES = tuple(LAYOUTS)


def _part(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 32, 32] uint8 and labels [n] of one data set's share of the digits, in a fixed shuffled order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = keyed_generator(0, "tiny grid").permutation(len(digits.target))
    mine = np.array_split(order, len(NAMES))[NAMES.index(name)]
    pixels = (digits.images[mine] * (255 / 16)).astype(np.uint8)
    enlarged = [np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BICUBIC)) for p in pixels]
    return np.stack(enlarged), digits.target[mine]


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert("RGB").save(path, quality=95)


def _write_caltech101(folder: Path) -> None:
    images, labels = _part("caltech101")
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        _save(pixels, folder / "101_ObjectCategories" / f"digit_{label}" / f"image_{index:04d}.jpg")


def _write_pet(folder: Path, num_train: int) -> None:
    images, labels = _part("pet")
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        _save(pixels, folder / "images" / f"Digit_{label}_{index}.jpg")
        lines.append(f"Digit_{label}_{index} {label + 1} 1 {label + 1}")
    (folder / "annotations" / "trainval.txt").write_text("\n".join(lines[:num_train]) + "\n")
    (folder / "annotations" / "test.txt").write_text("\n".join(lines[num_train:]) + "\n")


def _write_food101(folder: Path, num_train: int) -> None:
    images, labels = _part("food101")
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        _save(pixels, folder / "images" / f"digit_{label}" / f"{index}.jpg")
        lines.append(f"digit_{label}/{index}")
    (folder / "meta" / "train.txt").write_text("\n".join(lines[:num_train]) + "\n")
    (folder / "meta" / "test.txt").write_text("\n".join(lines[num_train:]) + "\n")


def _write_cifar100(folder: Path, num_train: int) -> None:
    images, labels = _part("cifar100")
    folder.mkdir(parents=True, exist_ok=True)
    planes = np.repeat(images[:, None], 3, axis=1).reshape(len(images), -1)
    for file, rows in (("train", slice(None, num_train)), ("test", slice(num_train, None))):
        content = {"data": planes[rows], "fine_labels": [int(label) for label in labels[rows]]}
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    names = {"fine_label_names": [f"digit_{label}" for label in range(10)]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))


def write_tiny_datasets(root: str | Path, *, num_train: int, num_glyphs: int) -> str:
    """Write the four data sets and the source below ``root``, each once and whole; returns the source folder.

    Args:
        root: the data root, as in ``prepare_dataset``.
        num_train: training images of each data set (out of about 449; Caltech101's split is drawn when it is read).
        num_glyphs: images of the source.
    """
    root = Path(root)
    source = write_demo_images(root / "demo", num_glyphs=num_glyphs).source
    writers: dict[str, Callable[[Path], None]] = {
        "caltech101": _write_caltech101,
        "pet": lambda folder: _write_pet(folder, num_train),
        "cifar100": lambda folder: _write_cifar100(folder, num_train),
        "food101": lambda folder: _write_food101(folder, num_train),
    }
    for name, layout in LAYOUTS.items():
        folder = root / layout.folder
        if folder.exists():
            continue
        partial = root / f"{layout.folder}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # left over from a killed process
        writers[name](partial)
        partial.rename(folder)
    return source
