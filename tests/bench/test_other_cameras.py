"""Photographs as other cameras take them: the same folders, the same content, less of it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from bench_scripts import script
from PIL import Image


def rewritten(folder, out, camera, monkeypatch):
    """Run the script; the images below ``out`` by name, as grayscale in [0, 255]."""
    monkeypatch.setattr(sys, "argv", ["other_cameras.py", str(folder), str(out), "--camera", camera])
    script("other_cameras").main()
    found = {path.relative_to(out).as_posix(): Image.open(path) for path in out.rglob("*.jpg")}
    assert all(image.mode == "RGB" for image in found.values())
    return {name: np.asarray(image.convert("L"), np.float64) for name, image in found.items()}


@pytest.fixture
def photographs(tmp_path):
    """A bright square on gray, twice below different folders, and with fine stripes."""
    square = np.full((96, 120, 3), 90, np.uint8)
    square[30:70, 40:80] = 230
    striped = square.copy()
    striped[:, ::2] //= 2
    for name, pixels in (("a/one.png", square), ("b/one.png", square), ("b/stripes.png", striped)):
        path = tmp_path / "photographs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "photographs"


@pytest.mark.parametrize("camera", ["night", "thumbnail", "lines"])
def test_folders_and_sizes_are_kept_and_runs_agree(photographs, tmp_path, monkeypatch, camera):
    first, second = (rewritten(photographs, tmp_path / name, camera, monkeypatch) for name in ("first", "second"))
    assert sorted(first) == ["a/one.jpg", "b/one.jpg", "b/stripes.jpg"]
    assert all(image.shape == (96, 120) for image in first.values())
    assert all((first[name] == second[name]).all() for name in first)


def test_a_night_camera_has_noise_of_its_own_for_each_image(photographs, tmp_path, monkeypatch):
    images = rewritten(photographs, tmp_path / "night", "night", monkeypatch)
    one, other = images["a/one.jpg"], images["b/one.jpg"]
    inside, outside = one[32:68, 42:78], one[:28]
    assert inside.mean() > outside.mean() + 50 and outside.std() > 20  # of a constant area
    assert abs(np.corrcoef((one[:28].ravel(), other[:28].ravel()))[0, 1]) < 0.1


def test_a_thumbnail_has_no_fine_detail(photographs, tmp_path, monkeypatch):
    images = rewritten(photographs, tmp_path / "thumbnail", "thumbnail", monkeypatch)
    assert np.abs(np.diff(images["b/stripes.jpg"][:20], axis=1)).max() < 12  # 45 before
    assert images["a/one.jpg"][45:55, 55:65].mean() == pytest.approx(230, abs=4)


def test_lines_are_dark_at_edges_alone(photographs, tmp_path, monkeypatch):
    lines = rewritten(photographs, tmp_path / "lines", "lines", monkeypatch)["a/one.jpg"]
    assert lines[28:32, 50:70].min() < 140 and lines[45:55, 55:65].min() > 240 and lines[5:20, 5:30].min() > 240
