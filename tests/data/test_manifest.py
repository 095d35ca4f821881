"""The training set of a run."""

from __future__ import annotations

import json
import os

import pytest

from fastuft.data import Manifest


def test_source_images_that_are_target_images_are_left_out(manifest):
    folder = os.path.dirname(manifest.paths[0])
    root = os.path.dirname(folder)
    joined = Manifest.build(folder, root, fraction=1.0)
    assert (joined.num_target, joined.num_source) == (20, 30) and len(set(joined.paths)) == 50
    with pytest.raises(ValueError, match="holds target images only"):
        Manifest.build(folder, folder)


def test_the_replayed_share_is_fixed_by_its_seed_and_saved(folders, tmp_path):
    first, again, other = (Manifest.build(*folders, fraction=0.3, seed=s) for s in (1, 1, 2))
    assert first == again and first.paths != other.paths
    assert (first.num_target, first.num_source, first.source_total) == (41, 27, 90)
    assert first.is_source.sum() == 27 and not first.is_source[:41].any()
    first.save(tmp_path / "manifest.json")
    saved = json.loads((tmp_path / "manifest.json").read_text())
    assert saved == {**first.summary(), "paths": list(first.paths)}
