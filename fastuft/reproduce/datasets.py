"""The paper's data sets, read from their published layouts and laid out as class folders.

Each data set becomes ``CACHE/<name>/train/<class>/...`` and ``.../test/<class>/...`` of symbolic links
(CIFAR-100, which is published as arrays, becomes PNG files), so that training and evaluation read every data set as
they read a user's own folders. Sizes are checked against the paper's (Li et al. 2021, Section 4).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tarfile
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from fastuft.randomness import keyed_generator

Metric = Literal["mean_class", "top1"]
# (class name, path of the original or a function that writes the image, file name)
Entry = tuple[str, "Path | Callable[[Path], None]", str]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


class DatasetMissing(ValueError):
    """A data set is not where its published layout puts it; the message says what to download and where to."""


@dataclass(frozen=True)
class Layout:
    """Where a data set's files are published to be, and what the paper says of it.

    Args:
        name: the name in the paper's tables.
        folder: folder below the data root.
        sentinel: a path below ``folder`` that is there when the data set is.
        download: what to fetch.
        train_size: training images in the paper.
        num_classes: classes in the paper.
        metric: how test accuracy is averaged.
    """

    name: str
    folder: str
    sentinel: str
    download: str
    train_size: int
    num_classes: int
    metric: Metric

    def locate(self, root: Path) -> Path:
        """The data set's folder; DatasetMissing when it is not there."""
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

    name: str
    train: str
    test: str
    metric: Metric
    train_size: int
    test_size: int
    num_classes: int


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def read_caltech101(folder: Path, *, per_class: int, seed: int) -> tuple[list[Entry], list[Entry]]:
    """``101_ObjectCategories/<class>/image_0001.jpg``: ``per_class`` images a class train, the rest is the test set.

    The paper does not publish its split; this one is drawn by ``seed`` and is the same on every machine.
    """
    train: list[Entry] = []
    test: list[Entry] = []
    for class_folder in _class_folders(folder / "101_ObjectCategories"):
        files = _image_files(class_folder)
        if len(files) <= per_class:
            raise ValueError(f"class {class_folder.name} has {len(files)} images; more than {per_class} are needed")
        order = keyed_generator(seed, "caltech101", class_folder.name).permutation(len(files))
        for rank, index in enumerate(order):
            (train if rank < per_class else test).append((class_folder.name, files[index], files[index].name))
    return train, test


def read_pet(folder: Path) -> tuple[list[Entry], list[Entry]]:
    """``images/<Breed>_<n>.jpg`` with ``annotations/trainval.txt`` and ``test.txt`` (name, class, species, breed)."""

    def split(list_file: str) -> list[Entry]:
        entries: list[Entry] = []
        for line in (folder / "annotations" / list_file).read_text().splitlines():
            if line and not line.startswith("#"):
                image = line.split()[0]
                entries.append((image.rsplit("_", 1)[0], folder / "images" / f"{image}.jpg", f"{image}.jpg"))
        return entries

    return split("trainval.txt"), split("test.txt")


def read_food101(folder: Path) -> tuple[list[Entry], list[Entry]]:
    """``images/<class>/<id>.jpg`` with ``meta/train.txt`` and ``meta/test.txt`` (lines: class/id)."""

    def split(list_file: str) -> list[Entry]:
        entries: list[Entry] = []
        for line in (folder / "meta" / list_file).read_text().split():
            class_name, image = line.split("/")
            entries.append((class_name, folder / "images" / class_name / f"{image}.jpg", f"{image}.jpg"))
        return entries

    return split("train.txt"), split("test.txt")


def _array_from_pickle(data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(data, dtype=dtype).reshape(shape)


class _InertArray:
    """Stands in for a NumPy array while its pickle is read: keeps the state and runs nothing."""

    def __init__(self, *_: object) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        raw = data.encode("latin-1") if isinstance(data, str) else data
        if fortran:
            self.array = _array_from_pickle(raw, np.dtype(dtype.code), shape[::-1]).T
        else:
            self.array = _array_from_pickle(raw, np.dtype(dtype.code), shape)


class _InertDtype:
    """Stands in for a NumPy dtype: keeps its code (only plain unsigned bytes and integers are accepted)."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        if self.code not in ("u1", "i4", "i8"):
            raise pickle.UnpicklingError(f"dtype {self.code!r} is not expected in CIFAR-100")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        pass


class _CifarUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings, numbers and byte arrays; every global resolves to an inert class of ours."""

    _STAND_INS: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _InertArray,
        ("numpy._core.multiarray", "_reconstruct"): _InertArray,
        ("numpy", "ndarray"): _InertArray,
        ("numpy", "dtype"): _InertDtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return lambda text, encoding: text.encode("latin-1")
        if (module, name) not in self._STAND_INS:
            raise pickle.UnpicklingError(f"refusing to load {module}.{name}; a CIFAR-100 file does not need it")
        return self._STAND_INS[module, name]


def read_cifar_pickle(path: Path) -> dict[str, Any]:
    """One file of ``cifar-100-python`` as a dict of lists and arrays, without running anything it names."""
    try:
        raw = _CifarUnpickler(io.BytesIO(path.read_bytes()), encoding="latin-1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a CIFAR-100 file: {error}; download cifar-100-python.tar.gz again") from error
    entries = ((key.decode() if isinstance(key, bytes) else key, value) for key, value in raw.items())
    return {key: value.array if isinstance(value, _InertArray) else value for key, value in entries}


def read_cifar100(folder: Path) -> tuple[list[Entry], list[Entry]]:
    """``cifar-100-python/{train,test,meta}``: rows of 3072 bytes, three planes of 32 x 32."""
    names = read_cifar_pickle(folder / "meta")["fine_label_names"]

    def split(file: str) -> list[Entry]:
        content = read_cifar_pickle(folder / file)
        planes = content["data"].reshape(len(content["fine_labels"]), 3, 32, 32).transpose(0, 2, 3, 1)

        def writer(pixels: np.ndarray) -> Callable[[Path], None]:
            return lambda path: Image.fromarray(pixels).save(path, format="PNG", compress_level=1)

        return [
            (names[label], writer(pixels), f"{index:05d}.png")
            for index, (label, pixels) in enumerate(zip(content["fine_labels"], planes, strict=True))
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
            3060,
            102,
            "mean_class",
        ),
        Layout(
            "pet",
            "oxford-iiit-pet",
            "annotations/trainval.txt",
            "images.tar.gz and annotations.tar.gz (the Oxford-IIIT Pet page of the Visual Geometry Group)",
            3680,
            37,
            "mean_class",
        ),
        Layout(
            "cifar100",
            "cifar-100-python",
            "train",
            "cifar-100-python.tar.gz (the CIFAR page of the University of Toronto)",
            50000,
            100,
            "top1",
        ),
        Layout(
            "food101",
            "food-101",
            "meta/train.txt",
            "food-101.tar.gz (the Food-101 page of ETH Zurich)",
            75750,
            101,
            "top1",
        ),
    )
}


def read_splits(name: str, folder: Path, *, caltech_per_class: int, seed: int) -> tuple[list[Entry], list[Entry]]:
    """Training and test entries of one data set."""
    if name == "caltech101":
        return read_caltech101(folder, per_class=caltech_per_class, seed=seed)
    return {"pet": read_pet, "cifar100": read_cifar100, "food101": read_food101}[name](folder)


def _partial(place: Path) -> Path:
    """Where a file is written before it takes its place; tasks of a job array may write the same one at once."""
    return place.with_name(f"{place.name}.{uuid.uuid4().hex}.partial")


def _lay_out(entries: Iterable[Entry], folder: Path) -> None:
    for class_name, origin, file_name in entries:
        place = folder / class_name / file_name
        if place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if callable(origin):
            partial = _partial(place)
            origin(partial)
            partial.replace(place)
        elif origin.is_file():
            with contextlib.suppress(FileExistsError):  # made by another task of a job array
                place.symlink_to(origin.resolve())
        else:
            raise DatasetMissing(f"{origin} is listed by the data set's split file but does not exist; unpack it again")


def prepare_dataset(
    name: str,
    root: str | Path,
    cache: str | Path,
    *,
    train_size: int | None = None,
    num_classes: int | None = None,
    caltech_per_class: int = 30,
    seed: int = 0,
) -> PreparedDataset:
    """Lay one data set out as class folders below ``cache``; a finished layout is reused.

    Args:
        name: caltech101, pet, cifar100 or food101.
        root: folder that holds the published data sets.
        cache: folder for the class folders.
        train_size: training images expected; the paper's by default.
        num_classes: classes expected; the paper's by default.
        caltech_per_class: training images a class of Caltech101.
        seed: seed of the Caltech101 split.

    Raises:
        DatasetMissing: the data set, or a listed file, is not there.
        ValueError: unknown name, or other sizes than expected.
    """
    if name not in LAYOUTS:
        raise ValueError(f"name={name!r} is not a known data set; choose one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    origin = layout.locate(Path(root))
    place = Path(cache) / name
    stamp_file = place / "prepared.json"
    request = {"origin": str(origin.resolve()), "caltech_per_class": caltech_per_class, "seed": seed}
    if stamp_file.exists():
        stamp = json.loads(stamp_file.read_text())
        if stamp.pop("request") == request:
            return PreparedDataset(**stamp)
        raise ValueError(
            f"cache={str(cache)!r} holds {name} prepared from other data or another split; use another folder"
        )

    train, test = read_splits(name, origin, caltech_per_class=caltech_per_class, seed=seed)
    found = (len(train), len({entry[0] for entry in train}))
    expected = (train_size or layout.train_size, num_classes or layout.num_classes)
    if found != expected:
        raise ValueError(
            f"{name} below {origin} has {found[0]} training images of {found[1]} classes; "
            f"expected are {expected[0]} of {expected[1]}. Download it again or check what was unpacked."
        )
    _lay_out(train, place / "train")
    _lay_out(test, place / "test")
    prepared = PreparedDataset(
        name, str(place / "train"), str(place / "test"), layout.metric, len(train), len(test), found[1]
    )
    partial = _partial(stamp_file)
    partial.write_text(json.dumps({"request": request, **asdict(prepared)}))
    os.replace(partial, stamp_file)
    return prepared


def extract_tar_sample(shards: str | Path, place: str | Path, *, fraction: float, seed: int) -> str:
    """The fixed random share of a source set that is kept in tar shards, as plain files below ``place``.

    Members of each shard (``*.tar``; the shard's name is the class folder) are drawn once by ``seed``, so only
    the share that joins training is ever unpacked. A finished sample is reused.

    Args:
        shards: folder of tar files.
        place: folder to write to.
        fraction: share of all images, in (0, 1].
        seed: seed of the draw, recorded beside the files.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction!r} is out of range; allowed: (0, 1]")
    tars = sorted(Path(shards).glob("*.tar"))
    if not tars:
        raise DatasetMissing(f"{shards} holds no .tar shards; name a folder of tar files")
    place = Path(place)
    stamp_file = place / "sample.json"
    stamp = {"shards": [tar.name for tar in tars], "fraction": fraction, "seed": seed}
    if stamp_file.exists() and json.loads(stamp_file.read_text()) == stamp:
        return str(place)
    members = []
    for shard, tar in enumerate(tars):
        with tarfile.open(tar) as archive:
            files = (m.name for m in archive if m.isfile())
            members += [(shard, name) for name in files if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    keep = round(len(members) * fraction)
    chosen = sorted(int(i) for i in keyed_generator(seed, "tar sample").permutation(len(members))[:keep])
    wanted: dict[int, list[str]] = {}
    for index in chosen:
        wanted.setdefault(members[index][0], []).append(members[index][1])
    for shard, names in wanted.items():
        folder = place / tars[shard].stem
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(tars[shard]) as archive:
            for name in names:
                content = archive.extractfile(name)
                assert content is not None  # only regular files were listed
                # The path inside the archive is flattened, so no member can be written elsewhere.
                target = folder / name.replace("/", "_").lstrip(".")
                partial = _partial(target)
                partial.write_bytes(content.read())
                partial.replace(target)
    stamp_file.write_text(json.dumps(stamp))
    return str(place)
