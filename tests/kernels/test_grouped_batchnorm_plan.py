"""The distribution of positions over programs: every position once, whole tiles, enough programs for a GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from fastuft.kernels.channel_tiles import BLOCK_ROWS, MAX_SPLITS, plan_positions

LAYERS = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]  # ResNet-50


@pytest.mark.parametrize("images", [32, 256, 4096])
@pytest.mark.parametrize(("channels", "side"), [*LAYERS, (24, 5), (3, 1)])
def test_every_position_is_in_one_split(images, channels, side):
    num_rows = 32 * side * side
    block, splits, rows_per_split = plan_positions(images // 32, num_rows, channels, 132)
    assert block & (block - 1) == 0
    assert rows_per_split % BLOCK_ROWS == 0
    assert (splits - 1) * rows_per_split < num_rows <= splits * rows_per_split
    assert splits <= MAX_SPLITS


@pytest.mark.parametrize(("channels", "side"), LAYERS)
def test_resnet_layers_fill_the_gpu(channels, side):
    block, splits, _ = plan_positions(8, 32 * side * side, channels, 132)
    assert 8 * splits * -(-channels // block) >= 132
