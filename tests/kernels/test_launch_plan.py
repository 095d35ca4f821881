"""How the launcher splits a queue: every key once, in one wave of programs, with bounded partial results."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize("multiprocessors", [1, 58, 108, 132, 148, 192])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_splits_cover_the_queue_once_and_bound_the_partials(multiprocessors, itemsize):
    from fastuft.kernels.launch_plan import PARTIAL_BYTES, plan_splits
    from fastuft.kernels.launch_table import ARCHS, WIDTHS, launch

    rows, keys = (1, 64, 65, 256, 384, 4096, 65536), (0, 1, 63, 64, 65, 507, 65536, 2**22)
    for arch, width, num_rows, num_keys in itertools.product(ARCHS, WIDTHS, rows, keys):
        config = launch(arch, itemsize, width, num_rows)
        splits, keys_per_split = plan_splits(num_rows, num_keys, width, config, multiprocessors)
        assert splits >= 1 and keys_per_split % config.block_k == 0
        assert (splits - 1) * keys_per_split <= max(num_keys - 1, 0) < splits * keys_per_split
        if splits > 1:
            assert splits * -(-num_rows // config.block_b) <= multiprocessors
            assert splits * num_rows * width * 4 <= PARTIAL_BYTES


def test_the_claimed_size_takes_the_same_memory_on_larger_chips():
    from fastuft.kernels.launch_plan import plan_splits
    from fastuft.kernels.launch_table import launch

    for arch, multiprocessors in ((90, 132), (100, 148), (100, 160)):
        assert plan_splits(256, 65536, 128, launch(arch, 2, 128, 256), multiprocessors) == (64, 1024)


@pytest.mark.parametrize(("major", "arch"), [(8, 80), (9, 90), (10, 100), (12, 80)])
def test_a_chip_is_looked_up_once(major, arch, monkeypatch):
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
