"""Unusable files: replaced equally on all ranks, recoded if only Pillow reads them, or named."""

from __future__ import annotations

import dataclasses
import os
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
from stream_cases import LOADERS, plain, small_stream, stream_of

from fastuft.config import DataConfig
from fastuft.data import BadImageError, EvalStream
from fastuft.data import feed as feed_module
from fastuft.data.backend import DecodeError
from fastuft.data.decoding import read_image


@pytest.mark.parametrize("loader", LOADERS)
def test_replacements_come_from_the_same_set_on_every_rank(manifest, tmp_path, loader):
    """A file that fails only in the decoder has the same replacements for one rank, two ranks and after a restart."""
    paths = []
    for index, path in enumerate(manifest.paths):
        copy = tmp_path / f"{index:02d}.png"
        content = Path(path).read_bytes()
        if index in (3, 21, 30):  # header and end are whole
            third = len(content) // 3
            content = content[:third] + bytes(third) + content[2 * third :]
        copy.write_bytes(content)
        paths.append(str(copy))
    damaged = dataclasses.replace(manifest, paths=tuple(paths))
    data = DataConfig(
        batch_size=8, loader=loader, threads=1, on_bad_file="skip", replay_mode="balanced", replay_share=0.5
    )

    def stream(rank=0, world_size=1):
        return stream_of(damaged, data, seed=5, rank=rank, world_size=world_size)

    one = stream()
    whole = [batch for epoch in range(2) for batch in one.epoch(epoch)]
    assert [os.path.basename(entry.path) for entry in one.bad_files] == ["03.png", "21.png", "30.png"]
    assert all("cannot be decoded" in entry.reason for entry in one.bad_files)
    for batch in whole:
        assert int(batch.is_source.sum()) == 4 and not {3, 21, 30} & set(batch.index.tolist())
    ranks = [stream(rank, 2) for rank in range(2)]
    parts = [[batch for epoch in range(2) for batch in rank.epoch(epoch)] for rank in ranks]
    for batch, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([half.query for half in halves]), batch.query)
    resumed = list(stream().epoch(1, start_step=1))
    assert torch.equal(resumed[0].key, whole[len(whole) // 2 + 1].key)


def test_too_many_bad_files_stop_even_when_skipping(manifest, tmp_path):
    paths = list(manifest.paths)
    for index in range(20, 29):
        paths[index] = str(tmp_path / f"{index}.png")
    damaged = dataclasses.replace(manifest, paths=tuple(paths))
    with pytest.raises(ValueError, match=r"of 15 files are bad, too many to skip .*verify-data"):
        list(small_stream(damaged, "torch", on_bad_file="skip", drop_last=False).epoch(0))


def test_files_are_read_in_parallel_and_ahead_of_the_batch(manifest, monkeypatch):
    """On network storage each read takes long, but the next batch must be ready."""
    lock, under_way, most, done = threading.Lock(), 0, 0, 0

    def slow_read(path, max_megapixels):
        nonlocal under_way, most, done
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.05)
        with lock:
            under_way -= 1
            done += 1
        return read_image(path, max_megapixels)

    monkeypatch.setattr(feed_module, "read_image", slow_read)
    stream = small_stream(manifest, "torch", prefetch=1)
    batches = stream.epoch(0)
    next(batches)
    assert most > 1
    give_up = time.monotonic() + 10
    while done < 32 and time.monotonic() < give_up:
        time.sleep(0.01)
    assert done == 32  # one batch is handed out, two are being made, and others are read meanwhile
    batches.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_hanging_file_is_named_and_does_not_block_the_others(manifest, monkeypatch, loader):
    hung = threading.Event()

    def read(path, max_megapixels):
        if path == manifest.paths[3]:
            hung.wait(30)
        return read_image(path, max_megapixels)

    monkeypatch.setattr(feed_module, "read_image", read)
    with pytest.raises(BadImageError, match=r"03\.png: cannot be read \(not read within 2 seconds\)"):
        list(small_stream(manifest, loader, read_timeout=2.0).epoch(0))
    stream = small_stream(manifest, loader, read_timeout=2.0, on_bad_file="skip", drop_last=False)
    index = torch.cat([batch.index for batch in stream.epoch(0)])
    assert len(index) == 35 and set(index.tolist()) == set(range(35)) - {3}
    hung.set()


@pytest.mark.parametrize("error", [TypeError("no"), NotImplementedError(), MemoryError(), struct.error("short")])
def test_any_parser_exception_is_attributed_to_its_file(manifest, monkeypatch, error):
    def read(path, max_megapixels):
        if path == manifest.paths[3]:
            raise error
        return read_image(path, max_megapixels)

    monkeypatch.setattr(feed_module, "read_image", read)
    with pytest.raises(BadImageError, match=rf"03\.png: cannot be read \({error or type(error).__name__}\)"):
        list(small_stream(manifest, "torch").epoch(0))


class StubbornBackend:
    """A backend that can read the header of one file but not decode it."""

    refused = ""

    def __init__(self, spec):
        self.spec = spec

    def run(self, requests):
        for request in requests:
            if not all(self.decodes(request.images)):
                raise DecodeError([request], RuntimeError("decoder"))
            yield request, [torch.zeros(len(request.images), 3, 8, 8)]

    def understands(self, image):
        return True

    def decodes(self, images):
        return [image.path != self.refused or image.header.format == "BMP" for image in images]

    def close(self):
        pass


def test_pillow_decodes_files_that_dali_refuses(manifest, monkeypatch, capsys):
    """Also if a list of labeled images names it twice."""
    monkeypatch.setattr(feed_module, "make_backend", lambda spec: StubbornBackend(spec))
    monkeypatch.setattr(StubbornBackend, "refused", manifest.paths[0])
    stream = EvalStream([*manifest.paths[:3], manifest.paths[0]], [0, 1, 2, 3], size=8, batch_size=3, loading=plain())
    labels = [label.tolist() for _, label in stream]
    assert capsys.readouterr().err.count("00.png: DALI cannot decode it, so Pillow decodes it") == 1
    assert labels == [[0, 1, 2], [3]]
    stream.close()


def test_other_failures_name_the_images_in_progress(manifest, monkeypatch):
    monkeypatch.setattr(feed_module, "make_backend", lambda spec: StubbornBackend(spec))
    monkeypatch.setattr(StubbornBackend, "refused", manifest.paths[0])
    trials = iter([[False]])
    monkeypatch.setattr(StubbornBackend, "decodes", lambda self, images: next(trials, [True] * len(images)))
    with pytest.raises(DecodeError, match=r"(?s)decoder.*while decoding: .*00\.png"):
        list(EvalStream(manifest.paths[:3], size=8, loading=plain()))
