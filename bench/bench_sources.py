"""Reading and decoding JPEGs from a folder and from a tar shard, compared with other packages.

Claim: reading a shard, image by image in any order, is about as fast as reading its folder; other packages read a shard from
its beginning or index files. Each row reads every image once and decodes it with Pillow; all rows must give the same pixels.
Times are processor time of all threads, so rates are per core. Memory is what a listing keeps allocated, per image of a folder
of 20,000 names.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import numpy as np
import pytest
from harness import measure, peer

pytest.importorskip("PIL")
pytest.importorskip("sklearn")

from PIL import Image
from sklearn.datasets import load_sample_images

from fastuft.data import list_images, read_bytes

GROUP = "read and decode, JPEG of 500 x 375"
MANY = 20_000

Reader = Callable[[Path, Path], Iterator[Image.Image]]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, smoke) -> tuple[Path, Path]:
    """(folder, shard) of the same photographs."""
    root = tmp_path_factory.mktemp("sources")
    folder, shard = root / "photos" / "all", root / "photos.tar"
    folder.mkdir(parents=True)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    generator = np.random.default_rng(0)
    for index in range(8 if smoke else 64):
        left, top = int(generator.integers(0, 140)), int(generator.integers(0, 52))
        crop = photos[index % len(photos)].crop((left, top, left + 500, top + 375))
        crop.save(folder / f"{index:04d}.jpg", quality=90)
    with tarfile.open(shard, "w") as archive:
        archive.add(folder, "all")
    return folder.parent, shard


def decoded(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def fastuft_folder(folder: Path, shard: Path) -> Iterator[Image.Image]:
    return (decoded(read_bytes(path)) for path in list_images(str(folder)))


def fastuft_shard(folder: Path, shard: Path) -> Iterator[Image.Image]:
    return (decoded(read_bytes(path)) for path in list_images(str(shard)))


def image_folder(folder: Path, shard: Path) -> Iterator[Image.Image]:
    datasets = peer("torchvision.datasets", "torchvision")
    return (image for image, _ in datasets.ImageFolder(str(folder)))


def webdataset_shard(folder: Path, shard: Path) -> Iterator[Image.Image]:
    webdataset = peer("webdataset")
    dataset = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
    return (decoded(sample["jpg"]) for sample in dataset)


def litdata_raw(folder: Path, shard: Path) -> Iterator[Image.Image]:
    litdata = peer("litdata")
    dataset = litdata.StreamingRawDataset(str(folder), cache_dir=str(shard.parent / "litdata"))
    return (decoded(dataset[row]) for row in range(len(dataset)))


READERS: list[Reader] = [image_folder, fastuft_folder, fastuft_shard, webdataset_shard, litdata_raw]


def digests(images: Iterator[Image.Image]) -> list[str]:
    return sorted(hashlib.sha256(image.tobytes()).hexdigest() for image in images)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_read(benchmark, photographs, reader):
    folder, shard = photographs
    expected = digests(fastuft_folder(folder, shard))
    assert digests(reader(folder, shard)) == expected and len(set(expected)) > 1

    def one_pass() -> None:
        for _ in reader(folder, shard):
            pass

    rounds = None if harness.SMOKE else 5
    baseline = reader is image_folder
    measure(
        benchmark,
        one_pass,
        group=GROUP,
        baseline=baseline,
        device="cpu",
        items=len(expected),
        memory=False,
        rounds=rounds,
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory, smoke) -> tuple[Path, Path]:
    """(folder, shard) of small files with the names of images, in classes."""
    root = tmp_path_factory.mktemp("many")
    count = 200 if smoke else MANY
    with tarfile.open(root / "many.tar", "w") as archive:
        for index in range(count):
            name = f"photos/class{index % 100:03d}/{index:07d}.jpg"
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"0")
            archive.add(path, name)
    return root / "photos", root / "many.tar"


def listed_folder(folder: Path, shard: Path) -> object:
    return list_images(str(folder))


def listed_shard(folder: Path, shard: Path) -> object:
    return list_images(str(shard))


def listed_image_folder(folder: Path, shard: Path) -> object:
    return peer("torchvision.datasets", "torchvision").ImageFolder(str(folder))


def listed_litdata(folder: Path, shard: Path) -> object:
    return peer("litdata").StreamingRawDataset(str(folder), cache_dir=str(shard.parent / "litdata"))


@pytest.mark.parametrize(
    "lister", [listed_image_folder, listed_folder, listed_shard, listed_litdata], ids=lambda lister: lister.__name__
)
def test_memory_of_a_listing(benchmark, many, lister, smoke):
    count = 200 if smoke else MANY
    lister(*many)  # imports and caches are not counted
    tracemalloc.start()
    held = lister(*many)
    alive = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(held) == count  # type: ignore[arg-type]
    measure(
        benchmark,
        lambda: lister(*many),
        group=f"listing {count} images",
        baseline=lister is listed_image_folder,
        device="cpu",
        items=count,
        memory=False,
        rounds=None if harness.SMOKE else 3,
        info={"bytes_per_image": round(alive / count)},
    )
