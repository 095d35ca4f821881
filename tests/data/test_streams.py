"""The training stream: exact coverage, and the same pixels for any ranks, threads, restarts and loaders."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from stream_cases import LOADERS, plain, smooth_picture, stream_of

from fastuft.config import AugmentConfig, DataConfig
from fastuft.data import (
    SMALL_IMAGES,
    BadImageError,
    EvalStream,
    LabeledTrainStream,
    Manifest,
    labeled_folder,
    open_rgb,
    verify_files,
)

COLOR = dataclasses.replace(AugmentConfig(), size=32)


def make(folders, loader="dali", augment=SMALL_IMAGES, seed=3, **changes):
    ranks = {name: changes.pop(name) for name in ("rank", "world_size") if name in changes}
    manifest = Manifest.build(*folders, fraction=0.3, seed=1)
    data = DataConfig(**{"batch_size": 16, "loader": loader, "threads": 1, **changes})
    return stream_of(manifest, data, augment, seed=seed, **ranks)


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_covers_every_image_once(folders, loader):
    stream = make(folders, loader, drop_last=False)
    batches = list(stream.epoch(0))
    index = torch.cat([batch.index for batch in batches])
    assert len(stream.manifest) == 41 + 27 and stream.steps_per_epoch == len(batches) == 5
    assert sorted(index.tolist()) == list(range(68))
    assert torch.equal(torch.cat([batch.is_source for batch in batches]), index >= 41)
    assert batches[-1].query.shape == (4, 3, 32, 32)
    assert batches[0].query.is_contiguous(memory_format=torch.channels_last)


def test_the_remainder_differs_between_epochs(folders):
    stream = make(folders, "torch")
    left_out = []
    for epoch in range(3):
        seen = torch.cat([batch.index for batch in stream.epoch(epoch)])
        assert len(set(seen.tolist())) == len(seen) == 64
        left_out.append(frozenset(set(range(68)) - set(seen.tolist())))
    assert len(set(left_out)) == 3


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("augment", [SMALL_IMAGES, COLOR], ids=["small", "color"])
def test_pixels_do_not_depend_on_ranks_or_threads(folders, loader, augment):
    whole = list(make(folders, loader, augment, threads=2).epoch(1))
    ranks = [list(make(folders, loader, augment, rank=r, world_size=2).epoch(1)) for r in range(2)]
    for step, batch in enumerate(whole):
        for name in ("query", "key", "index"):
            parts = [getattr(rank[step], name) for rank in ranks]
            assert torch.equal(torch.cat(parts), getattr(batch, name))
    assert not torch.equal(whole[0].query, whole[0].key)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_restart_continues_with_the_same_pixels(folders, loader):
    whole = list(make(folders, loader).epoch(2))
    stream = make(folders, loader)
    next(stream.epoch(0))  # an abandoned epoch leaves nothing behind
    rest = list(stream.epoch(2, start_step=2))
    assert [batch.step for batch in rest] == [2, 3]
    for ours, theirs in zip(rest, whole[2:], strict=True):
        assert torch.equal(ours.query, theirs.query) and torch.equal(ours.key, theirs.key)


def test_epochs_and_seeds_give_different_views(folders):
    first, second = (next(make(folders).epoch(e)) for e in (0, 1))
    other = next(make(folders, seed=4).epoch(0))
    assert not torch.equal(first.index, second.index) and not torch.equal(first.index, other.index)


@pytest.mark.parametrize("augment", [dataclasses.replace(SMALL_IMAGES, rotation=0.0), COLOR], ids=["small", "color"])
def test_both_loaders_give_nearly_the_same_pixels(folders, augment):
    ours, theirs = (next(make(folders, loader, augment).epoch(0)) for loader in LOADERS)
    assert torch.equal(ours.index, theirs.index)
    for name in ("query", "key"):
        difference = (getattr(ours, name) - getattr(theirs, name)).abs()
        assert difference.mean() < 0.004 and difference.max() < 0.08


def test_balanced_replay_fixes_the_share_of_each_batch(folders):
    stream = make(folders, "torch", replay_mode="balanced", replay_share=0.25)
    positions = []
    for epoch in range(4):
        for batch in stream.epoch(epoch):
            assert int(batch.is_source.sum()) == 4
            positions.append(tuple(batch.is_source.nonzero().flatten().tolist()))
    assert len(set(positions)) > len(positions) // 2
    targets = torch.cat([b.index[~b.is_source] for b in stream.epoch(0)])
    assert len(set(targets.tolist())) == len(targets) == 36


def test_prefill_gives_key_views(folders):
    stream = make(folders, "torch")
    views = list(stream.prefill(150))
    assert sum(len(v) for v in views) == 160 and all(len(v) == 16 for v in views)


@pytest.mark.parametrize("loader", LOADERS)
def test_evaluation_keeps_the_order_and_the_last_batch(folders, loader):
    paths, labels, names = labeled_folder(folders[0])
    assert names == ["class0", "class1", "class2"]
    stream = EvalStream(paths, labels, size=32, resize=36, batch_size=16, loading=plain(loader))
    batches = list(stream)
    assert [len(images) for images, _ in batches] == [16, 16, 9] and len(stream) == 3
    assert torch.cat([label for _, label in batches]).tolist() == labels
    again = list(stream)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize("loader", LOADERS)
def test_evaluation_view_is_resize_and_center_crop(folders, loader):
    paths, _, _ = labeled_folder(folders[0])
    stream = EvalStream(paths, size=32, resize=40, loading=plain(loader))
    for path, image in zip(paths, next(iter(stream))[0], strict=True):
        original = open_rgb(path)
        resized = original.resize(
            [40 * side // min(original.size) for side in original.size], Image.Resampling.BILINEAR
        )
        left, top = (round((side - 32) / 2) for side in resized.size)
        expected = np.asarray(resized.crop((left, top, left + 32, top + 32)), np.float32) / 255
        difference = np.abs(image.permute(1, 2, 0).numpy() - expected)
        assert difference.mean() < 0.002 and difference.max() < 0.02


@pytest.mark.parametrize("loader", LOADERS)
def test_labeled_stream_shuffles_images_with_their_labels(folders, loader):
    paths, labels, _ = labeled_folder(folders[0])
    crops = AugmentConfig(
        size=32, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), jitter_p=0, grayscale_p=0, blur_p=0, flip_p=0.5
    )
    stream = LabeledTrainStream(paths, labels, augment=crops, batch_size=16, seed=0, loading=plain(loader))
    first, second = ([label for _, label in stream.epoch(e)] for e in (0, 1))
    assert sorted(torch.cat(first).tolist()) == sorted(labels)
    assert not torch.equal(torch.cat(first), torch.cat(second))


def damage(path, kind):
    original = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(original[: len(original) // 2])
    elif kind == "html":
        path.write_bytes(b"<html><body>404</body></html>" * 20)
    elif kind == "vanished":
        path.unlink()
    elif kind == "inner":  # header and end are whole; the decoder fails
        middle = len(original) // 3
        path.write_bytes(original[:middle] + b"\x00" * (len(original) // 3) + original[middle + len(original) // 3 :])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["empty", "truncated", "html", "vanished", "inner"])
def test_bad_files_are_named_or_replaced_and_counted(tmp_path, loader, kind):
    generator = np.random.default_rng(0)
    for index in range(12):
        smooth_picture(generator, 64, 64).save(tmp_path / f"{index:02d}.png")
    manifest = Manifest.build(str(tmp_path))
    damage(tmp_path / "05.png", kind)
    config = DataConfig(batch_size=4, loader=loader)
    stream = stream_of(manifest, config, seed=0)
    with pytest.raises(BadImageError, match=r"05\.png.*on_bad_file=skip"):
        for epoch in range(2):
            list(stream.epoch(epoch))
    skipping = stream_of(manifest, dataclasses.replace(config, on_bad_file="skip"), seed=0)
    batches = list(skipping.epoch(0)) + list(skipping.epoch(1))
    assert [batch.step for batch in batches] == [0, 1, 2, 0, 1, 2]
    assert [entry.path for entry in skipping.bad_files] == [str(tmp_path / "05.png")]
    assert all(5 not in batch.index.tolist() for batch in batches)
    assert all(batch.query.isfinite().all() for batch in batches)
    bad = verify_files(manifest.paths, decode=True)
    assert [entry.path for entry in bad] == [str(tmp_path / "05.png")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 128}, "needs 128 images for one step, but there are only 68"),
        ({"batch_size": 16, "world_size": 3}, "does not divide over 3 processes"),
        ({"batch_size": 64, "replay_mode": "balanced"}, "needs 32 images"),
    ],
)
def test_impossible_batches_are_refused(folders, changes, message):
    if "balanced" in changes.values():
        changes = {**changes, "batch_size": 128, "replay_share": 0.2}
        message = "needs 102 images for one step, but there are only 41"
    with pytest.raises(ValueError, match=message):
        make(folders, "torch", **changes)
