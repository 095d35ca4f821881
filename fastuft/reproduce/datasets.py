"""The paper's data sets: read from their published layouts and prepared as class folders.

Each data set becomes ``CACHE/<name>/train/<class>/...`` and ``.../test/<class>/...`` with symbolic links (CIFAR-100, which is
published as arrays, becomes PNG files), so training and evaluation read every data set like a user's own folders. Sizes are
checked against the paper's (Li et al. 2021, Section 4).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fastuft.atomic import whole_file, write_whole
from fastuft.data import IMAGE_SUFFIXES, list_images
from fastuft.names import printable, safe_name
from fastuft.randomness import keyed_generator
from fastuft.reproduce.cifar import read_cifar_images, read_cifar_names

CALTECH_SEED = 0

Metric = Literal["mean_class", "top1"]
# (class name, path of the original or a function that writes the image, file name)
Entry = tuple[str, "Path | Callable[[Path], None]", str]


class DatasetMissing(ValueError):
    """A data set is missing; the message says what to download and where to put it."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of images and classes of a data set.

    Args:
        train: training images.
        test: test images; None skips the check (if publication or the draw leaves it open).
        classes: classes of both.
    """

    train: int
    test: int | None
    classes: int


@dataclass(frozen=True)
class Layout:
    """The published layout of a data set, and what the paper says about it.

    Args:
        name: the name in the paper's tables.
        folder: folder below the data root.
        sentinel: a path below ``folder`` that exists if the data set does.
        download: what to download.
        sizes: training images and classes in the paper, test images as published.
        metric: how test accuracy is averaged.
    """

    name: str
    folder: str
    sentinel: str
    download: str
    sizes: Sizes
    metric: Metric

    def locate(self, root: Path) -> Path:
        """The data set's folder; raises DatasetMissing if it does not exist."""
        folder = root / self.folder
        if not (folder / self.sentinel).exists():
            raise DatasetMissing(
                f"data set {self.name} is not below {root}: {folder / self.sentinel} does not exist. "
                f"Download {self.download} and unpack it so that this path exists."
            )
        return folder


@dataclass(frozen=True)
class PreparedDataset:
    """Class folders of one data set, ready for training and evaluation."""

    train: str
    test: str


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def read_caltech101(folder: Path, *, per_class: int) -> tuple[list[Entry], list[Entry]]:
    """``101_ObjectCategories/<class>/image_0001.jpg``: ``per_class`` images per class for training, the rest for test.

    The paper does not publish its split; this one is drawn with ``CALTECH_SEED`` and is the same on every machine.
    """
    train: list[Entry] = []
    test: list[Entry] = []
    for class_folder in _class_folders(folder / "101_ObjectCategories"):
        files = _image_files(class_folder)
        if len(files) <= per_class:
            raise ValueError(
                f"class {class_folder.name} has only {len(files)} images; more than {per_class} are needed"
            )
        order = keyed_generator(CALTECH_SEED, "caltech101", class_folder.name).permutation(len(files))
        for rank, index in enumerate(order):
            (train if rank < per_class else test).append((class_folder.name, files[index], files[index].name))
    return train, test


def read_pet(folder: Path) -> tuple[list[Entry], list[Entry]]:
    """``images/<Breed>_<n>.jpg`` with ``annotations/trainval.txt`` and ``test.txt`` (name, class, species, breed)."""

    def split(list_file: str) -> list[Entry]:
        entries: list[Entry] = []
        for line in (
            (folder / "annotations" / list_file).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        ):
            if line and not line.startswith("#"):
                image = line.split()[0]
                entries.append((image.rsplit("_", 1)[0], folder / "images" / f"{image}.jpg", f"{image}.jpg"))
        return entries

    return split("trainval.txt"), split("test.txt")


def read_food101(folder: Path) -> tuple[list[Entry], list[Entry]]:
    """``images/<class>/<id>.jpg`` with ``meta/train.txt`` and ``meta/test.txt`` (lines: class/id)."""

    def split(list_file: str) -> list[Entry]:
        entries: list[Entry] = []
        for line in (folder / "meta" / list_file).read_text(encoding="utf-8", errors="surrogateescape").split():
            class_name, _, image = line.partition("/")
            entries.append((class_name, folder / "images" / class_name / f"{image}.jpg", f"{image}.jpg"))
        return entries

    return split("train.txt"), split("test.txt")


def read_cifar100(folder: Path) -> tuple[list[Entry], list[Entry]]:
    """``cifar-100-python/{train,test,meta}``: rows of 3072 bytes, three planes of 32 x 32."""
    names = read_cifar_names(folder / "meta")

    def split(file: str) -> list[Entry]:
        images, labels = read_cifar_images(folder / file, len(names))

        def writer(pixels: np.ndarray) -> Callable[[Path], None]:
            return lambda path: Image.fromarray(pixels).save(path, format="PNG", compress_level=1)

        return [
            (names[label], writer(pixels), f"{index:05d}.png")
            for index, (label, pixels) in enumerate(zip(labels, images, strict=True))
        ]

    return split("train"), split("test")


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "caltech101",
            "caltech101",
            "101_ObjectCategories",
            "101_ObjectCategories.tar.gz (caltech-101.zip, from Caltech's data repository)",
            Sizes(3060, None, 102),
            "mean_class",
        ),
        Layout(
            "pet",
            "oxford-iiit-pet",
            "annotations/trainval.txt",
            "images.tar.gz and annotations.tar.gz (the Oxford-IIIT Pet page of the Visual Geometry Group)",
            Sizes(3680, 3669, 37),
            "mean_class",
        ),
        Layout(
            "cifar100",
            "cifar-100-python",
            "train",
            "cifar-100-python.tar.gz (the CIFAR page of the University of Toronto)",
            Sizes(50000, 10000, 100),
            "top1",
        ),
        Layout(
            "food101",
            "food-101",
            "meta/train.txt",
            "food-101.tar.gz (the Food-101 page of ETH Zurich)",
            Sizes(75750, 25250, 101),
            "top1",
        ),
    )
}


def read_splits(name: str, folder: Path, *, caltech_per_class: int) -> tuple[list[Entry], list[Entry]]:
    """The training and test entries of one data set."""
    if name == "caltech101":
        return read_caltech101(folder, per_class=caltech_per_class)
    return {"pet": read_pet, "cifar100": read_cifar100, "food101": read_food101}[name](folder)


def _lay_out(entries: Iterable[Entry], folder: Path) -> None:
    for class_name, origin, file_name in entries:
        target = folder / class_name / file_name
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if callable(origin):
            with whole_file(target, flush=False) as partial:
                origin(partial)
        elif origin.is_file():
            with contextlib.suppress(FileExistsError):  # made by another task of a job array
                target.symlink_to(origin.resolve())
        else:
            raise DatasetMissing(f"{origin} is listed by the data set's split file but does not exist; unpack it again")


def _check_names(name: str, origin: Path, *splits: Sequence[Entry]) -> None:
    """Refuse names that lead outside their class folder, and files that are listed twice."""
    for entries in splits:
        seen: set[tuple[str, str]] = set()
        for class_name, _, file_name in entries:
            for part in (class_name, file_name):
                if safe_name(part) != part:
                    raise ValueError(
                        f"{name} below {origin} has a class or file {printable(part)!r}, which is not a plain name. "
                        "Download it again."
                    )
            if (class_name, file_name) in seen:
                raise ValueError(f"{name} below {origin} lists {class_name}/{file_name} twice. Download it again.")
            seen.add((class_name, file_name))


def _check_sizes(name: str, origin: Path, train: Sequence[Entry], test: Sequence[Entry], expected: Sizes) -> None:
    found = Sizes(len(train), len(test), len({entry[0] for entry in train}))
    if found != replace(expected, test=found.test if expected.test is None else expected.test):
        tests = "" if expected.test is None else f" and {expected.test} test images"
        raise ValueError(
            f"{name} below {origin} has {found.train} training and {found.test} test images of {found.classes} classes; "
            f"expected {expected.train} training{tests} of {expected.classes}. "
            "Download it again or check what was unpacked."
        )


def prepare_dataset(
    name: str,
    root: str | Path,
    cache: str | Path,
    *,
    sizes: Sizes | None = None,
    caltech_per_class: int = 30,
) -> PreparedDataset:
    """Prepare one data set as class folders below ``cache``; a finished one is reused.

    Args:
        name: caltech101, pet, cifar100 or food101.
        root: folder with the published data sets.
        cache: folder for the class folders.
        sizes: expected sizes; the paper's by default.
        caltech_per_class: training images per class of Caltech101.

    Raises:
        DatasetMissing: the data set or a listed file does not exist.
        ValueError: an unknown name, unexpected sizes, or a cache with other content.
    """
    if name not in LAYOUTS:
        raise ValueError(f"name={name!r} is not a known data set; choose one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    origin = layout.locate(Path(root))
    folder = Path(cache) / name
    prepared = PreparedDataset(str(folder / "train"), str(folder / "test"))
    stamp_file = folder / "prepared.json"
    request = {"origin": str(origin.resolve()), "caltech_per_class": caltech_per_class, "seed": CALTECH_SEED}
    other = ValueError(
        f"cache={str(cache)!r} has {name} prepared from other data or with another split; use another folder"
    )
    if stamp_file.exists():
        if json.loads(stamp_file.read_text(encoding="utf-8")) == request:
            return prepared
        raise other

    train, test = read_splits(name, origin, caltech_per_class=caltech_per_class)
    _check_names(name, origin, train, test)
    _check_sizes(name, origin, train, test, sizes or layout.sizes)
    for part, entries in (("train", train), ("test", test)):
        _lay_out(entries, folder / part)
        if len(list_images(str(folder / part))) != len(entries):
            raise other  # left over from an interrupted preparation
    write_whole(stamp_file, json.dumps(request).encode())
    return prepared
