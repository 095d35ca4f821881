"""Looks: a fixed sample, the same views for every backbone, and no change to the backbone."""

from __future__ import annotations

import pytest
import torch
from image_folders import ColorNet, write_images

from fastuft.data import list_images
from fastuft.evaluate import Sample, look_at

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    target = list_images(write_images(root / "target", ["a", "b", "c"], 8, 0))
    (root / "target" / "a" / "0.png").write_bytes(b"no image")
    source = list_images(write_images(root / "source", ["d"], 10, 1))
    return Sample.take(target, source, images=64, size=16, flip_p=0.5, seed=0, batch_size=7)


def test_the_sample_leaves_bad_files_out(sample):
    assert len(sample.target) == 23 and len(sample.source) == 10


def test_a_look_at_the_start_equals_the_start(sample):
    features = sample.features(ColorNet(), CPU)
    look = look_at(features, features, 0)
    assert (look.step, look.images, look.neighbors_kept) == (0, 23, 1.0)
    assert look.source_cka == pytest.approx(1.0)
    assert 1 <= look.effective_rank <= 6 and 1 <= look.lidar <= 6
    assert 0 < look.view_agreement <= 1 and look.alignment > 0 and look.uniformity < 0


def test_looks_are_reproducible_and_do_not_change_the_backbone(sample):
    backbone = ColorNet().train()
    backbone.conv.eval()
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    first, again = (look_at(sample.features(backbone, CPU), None, 5) for _ in range(2))
    assert first == again and first.neighbors_kept is None and first.source_cka is None
    assert backbone.bn.training and not backbone.conv.training
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())


def test_collapsed_features_have_the_measures_that_exist(sample):
    class Collapsed(ColorNet):
        def forward(self, x):
            return super().forward(x) * 0 + 1

    look = look_at(sample.features(Collapsed(), CPU), sample.features(ColorNet(), CPU), 1)
    assert look.effective_rank == pytest.approx(1.0, abs=1e-3) and look.lidar is None
    assert look.view_agreement is None and look.neighbors_kept is None and look.source_cka is None
    assert look.uniformity == pytest.approx(0.0, abs=1e-6) and look.alignment == pytest.approx(0.0, abs=1e-6)
