"""The threads and the loader that are derived from the machine."""

from __future__ import annotations

import os
import types

import pytest
from stream_cases import plain

from fastuft import messages
from fastuft.data import loading as loading_module


@pytest.mark.parametrize(
    ("quota", "local_ranks", "threads", "expected"),
    [
        ("300000 100000", "1", 0, 3),
        ("50000 100000", "1", 0, 1),
        ("max 100000", "1", 0, 8),
        (None, "2", 0, 4),
        ("300000 100000", "16", 0, 1),
        ("300000 100000", "2", 5, 5),
    ],
)
def test_threads_are_derived_from_processors_quota_and_ranks(
    tmp_path, monkeypatch, quota, local_ranks, threads, expected
):
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(loading_module, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_ranks)
    assert plain(threads=threads).num_threads == expected


def test_missing_dali_is_reported_once_and_is_an_error_if_requested(monkeypatch, capsys):
    monkeypatch.setattr(messages, "_said", set())
    monkeypatch.setattr(loading_module.importlib, "util", types.SimpleNamespace(find_spec=lambda name: None))
    assert [loading_module.resolve_loader("auto") for _ in range(2)] == ["torch", "torch"]
    assert capsys.readouterr().err.count("DALI is not installed") == 1
    with pytest.raises(ValueError, match=r"data.loader='dali' needs DALI; pip install nvidia-dali-cuda130"):
        loading_module.resolve_loader("dali")
