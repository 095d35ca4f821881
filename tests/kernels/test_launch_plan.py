"""How the launcher splits a queue: every key once, in one wave of programs, with bounded partial results."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

pytest.importorskip("triton")


def short_and_tall(arch, precision, width):
    from fastuft.kernels.launch_table import launch

    return {launch(arch, precision, width, tall, "aligned") for tall in (False, True)}


@pytest.mark.parametrize("multiprocessors", [1, 58, 108, 132, 148, 192])
@pytest.mark.parametrize("precision", ["bf16", "ieee"])
def test_programs_cover_every_unit_once_in_one_wave(multiprocessors, precision):
    from fastuft.kernels.launch_plan import plan_units
    from fastuft.kernels.launch_table import ARCHS, WIDTHS

    rows, keys = (1, 64, 65, 256, 384, 4096, 65536), (0, 1, 63, 64, 65, 507, 65536, 2**22)
    for arch, width, num_rows, num_keys in itertools.product(ARCHS, WIDTHS, rows, keys):
        for config in short_and_tall(arch, precision, width):
            plan = plan_units(num_rows, num_keys, config, multiprocessors)
            assert plan.row_tiles * config.block_b >= num_rows > (plan.row_tiles - 1) * config.block_b
            assert plan.key_tiles == max(1, -(-num_keys // config.block_k))
            assert plan.programs * plan.units_per_program >= plan.units > (plan.programs - 1) * plan.units_per_program
            assert plan.programs <= multiprocessors * config.ctas and plan.units < 2**31


def test_no_batch_size_leaves_the_gpu_idle():
    """For every batch above one tile of rows, at least 85% of a wave is busy, without cliffs between batch sizes."""
    from fastuft.kernels.launch_plan import plan_units, tall_rows
    from fastuft.kernels.launch_table import launch

    keys, multiprocessors, least = 65536, 132, {}
    for rows in range(1, 20_481):
        config = launch(90, "bf16", 128, tall_rows(rows, keys, 128), "aligned")
        plan = plan_units(rows, keys, config, multiprocessors)
        least[rows] = plan.units / (multiprocessors * config.ctas * plan.units_per_program)
    assert min(share for rows, share in least.items() if rows > 64) >= 0.85
    assert min(least.values()) >= 0.75


def test_tile_rows_follow_the_l2_traffic():
    from fastuft.kernels.launch_plan import tall_rows

    assert not tall_rows(256, 65536, 128)  # 67 MB with 64 rows
    assert tall_rows(4096, 65536, 128)  # 1.07 GB
    assert not tall_rows(4096, 4096, 128)


@pytest.mark.parametrize("multiprocessors", [132, 148, 160])
def test_the_claimed_size_stays_below_ten_megabytes(multiprocessors):
    from fastuft.kernels.launch_plan import plan_units
    from fastuft.kernels.launch_table import launch

    for arch in (90, 100):
        config = launch(arch, "bf16", 128, False, "aligned")
        plan = plan_units(256, 65536, config, multiprocessors)
        assert (plan.row_tiles + plan.programs) * config.block_b * (128 + 2) * 4 < 9e6


@pytest.mark.parametrize(("major", "arch"), [(8, 80), (9, 90), (10, 100), (12, 80)])
def test_the_device_is_queried_once(major, arch, monkeypatch):
    from fastuft.kernels import launch_plan

    asked = []

    def properties(index):
        asked.append(index)
        return types.SimpleNamespace(major=major, multi_processor_count=100 + index)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    launch_plan._cuda_chip.cache_clear()
    try:
        for index in (0, 1, 0, 1):
            assert launch_plan.chip(torch.device("cuda", index)) == (arch, 100 + index)
    finally:
        launch_plan._cuda_chip.cache_clear()
    assert asked == [0, 1]
