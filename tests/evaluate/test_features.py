"""Feature extraction, its cache, and t-SNE maps."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn

from fastuft.evaluate import cached_features, extract_features, tsne
from fastuft.evaluate.features import files_hash, weights_hash


def backbone(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def stream(count=7, labels=True):
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for start in range(0, count, 3):
        part = x[start : start + 3]
        yield part, torch.arange(start, start + len(part)) if labels else None


def test_features_come_in_order_and_in_eval_mode():
    model = backbone().train()
    features, labels = extract_features(model, stream())
    assert features.shape == (7, 5) and features.dtype == torch.float32
    assert labels.tolist() == list(range(7))
    assert model.training and torch.equal(model[1].running_mean, torch.zeros(5))
    expected = model.eval()(torch.cat([x for x, _ in stream()]))
    torch.testing.assert_close(features, expected)


def test_missing_labels_give_none_and_no_images_are_refused():
    assert extract_features(backbone(), stream(labels=False))[1] is None
    with pytest.raises(ValueError, match="yielded no images"):
        extract_features(backbone(), iter(()))
    with pytest.raises(ValueError, match="precision='fp8' is not allowed"):
        extract_features(backbone(), stream(), precision="fp8")


def test_the_cache_hits_on_equal_content_and_misses_on_any_change(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    paths, cache = [str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "cache"
    reads = []

    def counted():
        reads.append(1)
        yield from stream(count=2)

    def get(model, files=paths, settings="32"):
        return cached_features(model, counted(), files, cache, settings=settings)

    first = get(backbone())
    assert torch.equal(get(backbone()), first) and len(reads) == 1
    get(backbone(seed=1))
    get(backbone(), settings="64")
    get(backbone(), files=paths[::-1])
    assert len(reads) == 4
    (tmp_path / "moved").write_text("a")
    get(backbone(), files=[str(tmp_path / "moved"), paths[1]])
    assert len(reads) == 4  # equal bytes under another name
    (tmp_path / "a").write_text("changed")
    get(backbone())
    assert len(reads) == 5
    assert not list(cache.glob("*.partial"))
    cached_features(backbone(), counted(), paths, None, settings="32")
    assert len(reads) == 6


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "foreign"])
def test_a_damaged_cache_entry_is_recomputed(tmp_path, damage):
    (tmp_path / "a").write_text("a")
    paths, cache = [str(tmp_path / "a")] * 7, tmp_path / "cache"
    first = cached_features(backbone(), stream(), paths, cache, settings="32")
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    entry.write_bytes({"truncated": content[:-9], "altered": flipped, "empty": b"", "foreign": b"x" * 99}[damage])
    with pytest.warns(UserWarning, match="are damaged; they are computed again"):
        assert torch.equal(cached_features(backbone(), stream(), paths, cache, settings="32"), first)
    assert entry.read_bytes() == content
    assert torch.equal(cached_features(backbone(), iter(()), paths, cache, settings="32"), first)


def test_an_unwritable_cache_loses_no_features(tmp_path):
    (tmp_path / "a").write_text("a")
    with pytest.warns(UserWarning, match=r"could not be cached in .*a/.*: File exists"):
        found = cached_features(backbone(), stream(), [str(tmp_path / "a")] * 7, tmp_path / "a", settings="32")
    assert found.shape == (7, 5)


def test_hashes_depend_on_structure_values_and_order(tmp_path):
    assert weights_hash(backbone()) == weights_hash(backbone())
    assert weights_hash(backbone()) != weights_hash(nn.Sequential(*backbone(), nn.Identity()))
    (tmp_path / "x").write_text("x")
    (tmp_path / "y").write_text("y")
    x, y = str(tmp_path / "x"), str(tmp_path / "y")
    assert files_hash([x, y]) != files_hash([y, x])


def test_a_pipe_among_the_images_is_named_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"x\.jpg: cannot be read \(it is a pipe"):
        files_hash([str(tmp_path / "x.jpg")])


def test_tsne_keeps_separated_groups_apart_and_is_seeded():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 30)
    x = rng.normal(size=(60, 12)) * 0.1 + np.eye(12)[labels * 5]
    first = tsne(x, seed=1)
    assert first.shape == (60, 2) and first.dtype == np.float32 and np.isfinite(first).all()
    centers = np.stack([first[labels == c].mean(0) for c in (0, 1)])
    spread = max(np.linalg.norm(first[labels == c] - centers[c], axis=1).max() for c in (0, 1))
    assert np.linalg.norm(centers[0] - centers[1]) > spread
    np.testing.assert_array_equal(first, tsne(x, seed=1))
    with pytest.raises(ValueError, match="at least 5 images, got 3"):
        tsne(x[:3])
