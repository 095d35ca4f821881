"""Images that look alike are found in any format and size, and others are not."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from fastuft.cli.main import main
from fastuft.config import EvalConfig
from fastuft.data import Manifest, duplicates, find_duplicates
from fastuft.evaluate.folders import read_folders
from fastuft.trainer.doubts import doubts_about


def photograph(number, side=160):
    """A smooth picture with edges, similar to a photograph."""
    generator = np.random.default_rng([number, 7])
    coarse = Image.fromarray(generator.integers(0, 256, (7, 9, 3)).astype(np.uint8))
    picture = coarse.resize((side * 9 // 7, side), Image.Resampling.BICUBIC)
    x, y = generator.integers(0, side // 2, 2)
    picture.paste(tuple(generator.integers(0, 256, 3).tolist()), (x, y, x + side // 3, y + side // 3))
    return picture


@pytest.fixture
def photographs(tmp_path):
    """Paths of 40 different pictures."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(40):
        photograph(number).save(folder / f"{number:02d}.jpg", quality=92)
    return sorted(map(str, folder.iterdir()))


def test_different_images_are_not_duplicates(photographs):
    found = find_duplicates(photographs)
    assert (found.checked, found.total, found.repeated, found.pair) == (40, 40, 0, ())
    assert found.share == 0 and found.line() == ""


@pytest.mark.parametrize(
    ("suffix", "scale", "options"),
    [("jpg", 1.0, {"quality": 60}), ("png", 1.0, {}), ("jpg", 0.7, {"quality": 90}), ("webp", 1.0, {"quality": 70})],
)
def test_copies_are_duplicates(photographs, tmp_path, suffix, scale, options):
    copies = []
    for number in range(10):
        with Image.open(photographs[number]) as image:
            small = image.resize((round(image.width * scale), round(image.height * scale)))
        copies.append(str(tmp_path / f"copy{number}.{suffix}"))
        small.save(copies[-1], **options)
    found = find_duplicates([*photographs, *copies])
    assert found.repeated >= 9
    assert found.pair[0] in photographs and found.pair[1] in copies


def test_each_group_counts_once(photographs, tmp_path):
    copies = [shutil.copy(photographs[0], tmp_path / f"{number}.jpg") for number in range(3)]
    found = find_duplicates([*photographs, *map(str, copies)])
    assert found.repeated == 3 and found.pair[0] == photographs[0]
    assert found.line().startswith("3 of 43 images look like another one (first: ")


def test_small_images_are_compared_by_pixels(tmp_path):
    """Two strokes on 28 px are equal in every coarse measure."""
    paths = []
    for number in range(4):
        pixels = np.zeros((28, 28), np.uint8)
        pixels[4:24, 13:15] = 255
        pixels[4 + number // 2, 13] = 128
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    found = find_duplicates(paths)
    assert found.repeated == 2 and found.pair == (paths[0], paths[1])


def test_files_that_are_not_images_do_not_count(photographs, tmp_path):
    (tmp_path / "damaged.jpg").write_bytes(b"\xff\xd8\xff" + b"x" * 500)
    found = find_duplicates([*photographs, str(tmp_path / "damaged.jpg"), str(tmp_path / "missing.jpg")])
    assert (found.checked, found.total, found.repeated) == (40, 42, 0)


def test_the_search_is_bounded_in_time(photographs, monkeypatch):
    monkeypatch.setattr(duplicates, "_AT_ONCE", 8)
    found = find_duplicates(photographs, seconds=0.0)
    assert found.checked == 8 and found.total == 40


def test_every_copy_is_found_by_band_hashing():
    """Hashes that differ in at most the allowed number of bits share one of eight bands."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 256, (500, 16)).astype(np.uint8)
    copies = bits.copy()
    for row in copies:
        for bit in generator.permutation(128)[: duplicates.DISTANCE]:
            row[bit // 8] ^= 1 << (bit % 8)
    pairs = duplicates._similar(np.concatenate([bits, copies]))
    assert pairs == {(row, 500 + row) for row in range(500)}


def test_overlap_of_test_and_training_images_raises_a_doubt(photographs, tmp_path):
    for name, numbers in (("train", range(30)), ("test", range(25, 40))):
        for number in numbers:
            folder = tmp_path / name / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(photographs[number], folder / f"{name}{number}.jpg")
    config = EvalConfig(checkpoint="c", train=str(tmp_path / "train"), test=str(tmp_path / "test"))
    (doubt,) = read_folders(config).doubts
    assert doubt.startswith("5 of 15 test images look like a training image") and "flattered" in doubt


def test_verify_data_reports_copies(photographs, tmp_path, capsys):
    folder = tmp_path / "photographs"
    assert main(["verify-data", str(folder)]) == 0
    assert "no two of 40 images look alike" in capsys.readouterr().out
    shutil.copy(photographs[3], folder / "again.jpg")
    assert main(["verify-data", str(folder)]) == 0
    assert "1 of 41 images look like another one" in capsys.readouterr().out
    assert main(["verify-data", str(folder), "--duplicates", "false"]) == 0
    assert "alike" not in capsys.readouterr().out


def test_a_run_warns_of_few_images_and_of_copies(photographs, tmp_path):
    few, copies = doubts_about(Manifest.build([*photographs, shutil.copy(photographs[0], tmp_path / "copy.jpg")]))
    assert few.startswith("41 target images are few") and copies.startswith("1 of 41 images look like another one")
    assert len(doubts_about(Manifest.build(photographs))) == 1
