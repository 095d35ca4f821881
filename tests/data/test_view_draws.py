"""The random numbers of views: keyed by position, distributed as configured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastuft.config import AugmentConfig
from fastuft.data import CROP_DRAWS, SMALL_IMAGES, crop_regions
from fastuft.data.views import draw_views, uniforms


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3000), st.integers(1, 300), st.integers(1, 300))
def test_draws_depend_on_position_only(first, count, split):
    """Any division of a range of positions into batches gives the same numbers."""
    positions = np.arange(first, first + count)
    whole = uniforms(1, 2, 0, positions)
    parts = [uniforms(1, 2, 0, positions[at : at + split]) for at in range(0, count, split)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole, uniforms(1, 2, 1, positions))


def test_views_have_the_configured_distribution():
    augment = AugmentConfig()
    n = 40_000
    sizes = np.tile([500, 375], (n, 1))
    view = draw_views(augment, sizes, uniforms(0, 0, 0, np.arange(n)))
    height, width = (view.roi_end - view.roi_start).T
    share, aspect = height * width / (500 * 375), np.log(width / height)
    assert share.min() > 0.198 and share.max() <= 1
    assert np.abs(aspect).max() < np.log(4 / 3) + 0.02
    assert (view.roi_start >= 0).all() and (view.roi_end <= [375, 500]).all()
    for values, probability in ((view.sigma > 0, 0.5), (view.flip, 0.5), (view.saturation == 0, 0.2)):
        assert abs(values.mean() - probability) < 0.01
    jittered = view.brightness != 1
    assert abs(jittered.mean() - 0.8) < 0.01 and abs(view.brightness[jittered].mean() - 1) < 0.01
    assert abs(view.hue[jittered]).max() <= 36 and view.brightness.min() >= 0.6 and view.brightness.max() <= 1.4
    assert view.sigma.max() <= 2 and view.sigma[view.sigma > 0].min() >= 0.1
    assert (view.angle == 0).all()


def test_the_small_image_preset_equals_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "augmentations.md").read_text()
    lines = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    pairs = {name: tuple(value) if isinstance(value, list) else value for name, value in lines["augment"].items()}
    assert AugmentConfig(**pairs) == SMALL_IMAGES


def test_crops_of_a_seed_are_fixed():
    """Resumed runs and committed figures depend on them."""
    sizes = np.tile([500, 375], (3, 1))
    view = draw_views(AugmentConfig(), sizes, uniforms(0, 0, 0, np.arange(3)))
    crops = np.concatenate([view.roi_start, view.roi_end], 1).astype(int).tolist()
    assert crops == [[4, 90, 328, 376], [64, 64, 277, 326], [75, 35, 349, 250]]
    start, end = crop_regions(sizes, uniforms(0, 0, 0, np.arange(3))[:, :CROP_DRAWS], (0.2, 1.0), (3 / 4, 4 / 3))
    assert np.concatenate([start, end], 1).astype(int).tolist() == crops
