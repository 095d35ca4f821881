"""The DALI pipeline for a GPU: its graph on any machine, its pixels on a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from stream_cases import plain, small_stream, stream_of

from fastuft.config import DataConfig
from fastuft.data import StrongConfig
from fastuft.data.backend import ViewSpec


@pytest.mark.parametrize("strong", [None, StrongConfig()], ids=["moco", "strong"])
def test_the_gpu_pipeline_builds(strong):
    """Building refuses unknown arguments of operators and view parameters on the GPU, also without a GPU."""
    pytest.importorskip("nvidia.dali")
    from fastuft.data.dali import _view_pipeline

    spec = ViewSpec(
        size=32,
        num_views=2,
        color=True,
        blur=True,
        rotation=True,
        batch_size=4,
        loading=plain(device=torch.device("cuda", 0), dtype=torch.bfloat16),
        largest=(500, 375),
        strong=strong,
    )
    nodes = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*The external source node")
        pipeline = _view_pipeline(lambda: None, spec, batch_size=4, num_threads=1, device_id=0)
        pipeline.start_py_workers()  # there are none: only the graph is made
        for operator in pipeline._ops:
            inputs = operator.inputs if isinstance(operator.inputs, (list, tuple)) else [operator.inputs]
            name = getattr(operator._op, "schema_name", type(operator._op).__name__)
            nodes.append((name, operator._op.device, [node.device for node in inputs if node is not None]))
    assert [device for name, device, _ in nodes if name == "decoders__Image"] == ["mixed"]
    drawn = ("Resize", "Rotate", "ColorTwist", "GaussianBlur", "CropMirrorNormalize")
    assert {name for name, _, _ in nodes} >= set(drawn)
    for name, device, inputs in nodes:
        if name in drawn:
            assert (device, inputs[0], set(inputs[1:])) == ("gpu", "gpu", {"cpu"}), name


def test_results_are_ordered_on_the_consumers_stream(manifest, monkeypatch):
    """DALI's ``run`` takes the stream only by position; a keyword would be an input of the pipeline."""
    pytest.importorskip("nvidia.dali")
    stream = small_stream(manifest)
    backend = stream._feed._backend
    outputs, streams = backend._pipeline.outputs, []
    monkeypatch.setattr(backend, "_device_id", 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    monkeypatch.setattr(backend._pipeline, "outputs", lambda stream: (streams.append(stream), outputs())[1])
    batches = list(stream.epoch(0))
    assert streams[: len(batches)] == [("stream of", 3)] * len(batches)
    for ours, theirs in zip(batches, small_stream(manifest).epoch(0), strict=True):
        assert torch.equal(ours.query, theirs.query)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_views_agree_with_the_cpu(jpegs, dtype):
    pytest.importorskip("nvidia.dali")
    device = torch.device("cuda", torch.cuda.current_device())
    data = DataConfig(batch_size=8, loader="dali")
    there = stream_of(jpegs, data, seed=5, device=device, dtype=dtype)
    for ours, theirs in zip(there.epoch(0), small_stream(jpegs).epoch(0), strict=True):
        assert ours.query.device == device and ours.query.dtype == dtype
        assert ours.query.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours.index, theirs.index)
        difference = (ours.query.float().cpu() - theirs.query).abs()
        assert difference.mean() < 0.01


@pytest.mark.gpu
def test_gpu_views_do_not_block_the_host(jpegs):
    pytest.importorskip("nvidia.dali")
    device = torch.device("cuda", torch.cuda.current_device())
    data = DataConfig(batch_size=8, loader="dali")
    stream = stream_of(jpegs, data, seed=5, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = sum(batch.query.sum() + batch.key.sum() for batch in stream.epoch(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(total)


@pytest.mark.gpu
def test_gpu_pixels_do_not_depend_on_ranks(jpegs):
    pytest.importorskip("nvidia.dali")
    device = torch.device("cuda", torch.cuda.current_device())
    data = DataConfig(batch_size=8, loader="dali")

    def batches(rank, world_size):
        options = {"seed": 5, "rank": rank, "world_size": world_size, "device": device}
        return list(stream_of(jpegs, data, **options).epoch(0))

    for whole, *halves in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        assert torch.equal(torch.cat([half.query for half in halves]), whole.query)
