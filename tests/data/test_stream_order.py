"""Order, coverage and keyed numbers for any sizes; what a stream does when it is left, held or killed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastuft.config import AugmentConfig, DataConfig
from fastuft.data import SMALL_IMAGES, EvalStream, Manifest, StrongConfig, TrainStream, image_size, list_images
from fastuft.data import backend as backend_module
from fastuft.data import feed as feed_module
from fastuft.data.backend import DecodeError, ViewSpec
from fastuft.data.order import EpochPlan
from fastuft.data.views import draw_views, uniforms

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
LOADERS = ["dali", "torch"]
counts = st.integers(1, 60)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("order")
    generator = np.random.default_rng(0)
    for name, count in (("target", 20), ("source", 30)):
        (root / name).mkdir()
        for index in range(count):
            coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((40, 36), Image.Resampling.BICUBIC).save(root / name / f"{index:02d}.png")
    return Manifest.build(str(root / "target"), str(root / "source"), fraction=0.5)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """JPEGs, which a GPU decodes itself."""
    root = tmp_path_factory.mktemp("jpegs")
    generator = np.random.default_rng(1)
    for index in range(32):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((320 + index, 240), Image.Resampling.BICUBIC).save(root / f"{index:02d}.jpg", quality=90)
    return Manifest.build(str(root))


def make(manifest, loader="dali", **changes):
    data = DataConfig(**{"batch_size": 8, "loader": loader, "threads": 1, **changes})
    return TrainStream(manifest, data, SMALL_IMAGES, seed=5, **PLAIN)


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(0, 60), st.integers(1, 16), st.booleans(), st.integers(0, 5))
def test_union_covers_everything_once(num_target, num_source, batch, drop_last, epoch):
    if drop_last and num_target + num_source < batch:
        return
    plan = EpochPlan(num_target, num_source, batch, drop_last=drop_last)
    order = plan.order(7, epoch)
    everything = num_target + num_source
    assert len(set(order.tolist())) == len(order) == (everything // batch * batch if drop_last else everything)
    assert len(order) == 0 or 0 <= order.min() <= order.max() < everything
    assert plan.steps == -(-len(order) // batch)


@settings(max_examples=60, deadline=None)
@given(counts, counts, st.integers(2, 16), st.floats(0, 1), st.booleans())
def test_balanced_covers_the_target_once_and_the_source_evenly(num_target, num_source, batch, share, drop_last):
    try:
        plan = EpochPlan(num_target, num_source, batch, "balanced", share, drop_last)
    except ValueError:
        assert drop_last and num_target < batch
        return
    uses = np.zeros(num_source, int)
    for epoch in range(4):
        order = plan.order(7, epoch)
        targets = order[order < num_target]
        assert len(set(targets.tolist())) == len(targets)
        if not drop_last:
            assert len(targets) == num_target
        uses += np.bincount(order[order >= num_target] - num_target, minlength=num_source)
        for step in range(plan.steps):
            rows = order[step * batch : (step + 1) * batch]
            assert len(rows) < batch or (rows >= num_target).sum() == plan.source_rows
    assert uses.max() - uses.min() <= 1  # the passes over the source go on from epoch to epoch


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("mode", ["union", "balanced"])
def test_ranks_take_disjoint_slices_with_the_same_pixels(manifest, loader, mode):
    """One, two, four and eight ranks with different numbers of threads; a step's slices make up the global batch."""
    changes = {"replay_mode": mode, "replay_share": 0.25} if mode == "balanced" else {}

    def batches(rank, world_size):
        data = DataConfig(batch_size=8, loader=loader, threads=1 + rank % 3, **changes)
        return list(
            TrainStream(manifest, data, SMALL_IMAGES, seed=5, rank=rank, world_size=world_size, **PLAIN).epoch(3)
        )

    whole = batches(0, 1)
    assert len(whole) == (4 if mode == "union" else 3)
    for world_size in (2, 4, 8):
        ranks = [batches(rank, world_size) for rank in range(world_size)]
        for step, batch in enumerate(whole):
            for name in ("query", "key", "index", "is_source"):
                parts = [getattr(rank[step], name) for rank in ranks]
                assert {len(part) for part in parts} == {8 // world_size}
                assert torch.equal(torch.cat(parts), getattr(batch, name))


@pytest.mark.parametrize("changes", [{}, {"replay_mode": "balanced", "replay_share": 0.5}, {"drop_last": False}])
def test_a_restart_at_any_step_gives_the_same_rows(manifest, changes):
    whole = list(make(manifest, "torch", **changes).epoch(4))
    for start in range(len(whole)):
        rest = list(make(manifest, "torch", **changes).epoch(4, start_step=start))
        assert [batch.step for batch in rest] == list(range(start, len(whole)))
        for ours, theirs in zip(rest, whole[start:], strict=True):
            assert torch.equal(ours.query, theirs.query) and torch.equal(ours.index, theirs.index)


def test_balanced_replay_needs_source_images():
    with pytest.raises(ValueError, match=r"balanced.*name a source folder"):
        EpochPlan(10, 0, 4, "balanced")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3000), st.integers(1, 300), st.integers(1, 300))
def test_numbers_belong_to_positions(first, count, split):
    """Any cut of a range of positions into batches gives the same numbers."""
    positions = np.arange(first, first + count)
    whole = uniforms(1, 2, 0, positions)
    parts = [uniforms(1, 2, 0, positions[at : at + split]) for at in range(0, count, split)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole, uniforms(1, 2, 1, positions))


def test_views_have_the_distribution_that_the_config_says():
    augment = AugmentConfig()
    n = 40_000
    sizes = np.tile([500, 375], (n, 1))
    view = draw_views(augment, sizes, uniforms(0, 0, 0, np.arange(n)))
    height, width = (view.roi_end - view.roi_start).T
    share, aspect = height * width / (500 * 375), np.log(width / height)
    assert share.min() > 0.198 and share.max() <= 1
    assert np.abs(aspect).max() < np.log(4 / 3) + 0.02
    assert (view.roi_start >= 0).all() and (view.roi_end <= [375, 500]).all()
    for values, probability in ((view.sigma > 0, 0.5), (view.flip, 0.5), (view.saturation == 0, 0.2)):
        assert abs(values.mean() - probability) < 0.01
    jittered = view.brightness != 1
    assert abs(jittered.mean() - 0.8) < 0.01 and abs(view.brightness[jittered].mean() - 1) < 0.01
    assert abs(view.hue[jittered]).max() <= 36 and view.brightness.min() >= 0.6 and view.brightness.max() <= 1.4
    assert view.sigma.max() <= 2 and view.sigma[view.sigma > 0].min() >= 0.1
    assert (view.angle == 0).all()


def test_the_preset_for_small_images_is_the_one_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "augmentations.md").read_text()
    lines = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    pairs = {name: tuple(value) if isinstance(value, list) else value for name, value in lines["augment"].items()}
    assert AugmentConfig(**pairs) == SMALL_IMAGES


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_that_are_held_are_not_overwritten(manifest, loader):
    held = [batch for epoch in range(3) for batch in make(manifest, loader).epoch(epoch)]
    stream = make(manifest, loader)
    held_of_one = [batch for epoch in range(3) for batch in stream.epoch(epoch)]
    for ours, theirs in zip(held_of_one, held, strict=True):
        assert torch.equal(ours.query, theirs.query) and torch.equal(ours.key, theirs.key)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("taken", [1, 3, 4])
def test_an_epoch_that_is_left_leaves_nothing_behind(manifest, loader, taken):
    """Also where every batch was taken and only the end was not reached."""
    stream = make(manifest, loader)
    left = stream.epoch(0)
    for _ in range(taken):
        next(left)
    ours, theirs = list(stream.epoch(1)), list(make(manifest, loader).epoch(1))
    assert len(ours) == len(theirs) == 4
    assert all(torch.equal(a.query, b.query) for a, b in zip(ours, theirs, strict=True))
    stream.close()
    stream.close()  # twice does no harm


def test_prefill_draws_no_view_of_training(manifest):
    stream = make(manifest, "torch")
    prefilled = list(stream.prefill(60))
    assert [len(views) for views in prefilled] == [8] * 8
    fresh = list(make(manifest, "torch").epoch(0))
    assert all(torch.equal(a.key, b.key) for a, b in zip(stream.epoch(0), fresh, strict=True))
    assert not any(torch.equal(views, batch.key) for views in prefilled for batch in fresh)


@pytest.mark.parametrize("loader", LOADERS)
def test_skipped_files_have_replacements_of_their_kind_on_every_rank(manifest, tmp_path, loader):
    """A file that fails only in the decoder: the same replacements for one rank, two ranks and a restart."""
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
        return TrainStream(damaged, data, SMALL_IMAGES, seed=5, rank=rank, world_size=world_size, **PLAIN)

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
        list(make(damaged, "torch", on_bad_file="skip", drop_last=False).epoch(0))


def test_new_files_are_looked_at_in_parallel_and_a_batch_ahead(manifest, monkeypatch):
    """On network storage each look waits; the batch that is wanted must not."""
    lock, under_way, most, looked = threading.Lock(), 0, 0, 0

    def slow_look(path, max_megapixels):
        nonlocal under_way, most, looked
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.05)
        with lock:
            under_way -= 1
            looked += 1
        return image_size(path, max_megapixels)

    monkeypatch.setattr(feed_module, "image_size", slow_look)
    stream = make(manifest, "torch", prefetch=1)
    batches = stream.epoch(0)
    next(batches)
    assert most > 1
    # One batch is handed out, two are being made, and one more is looked at meanwhile.
    give_up = time.monotonic() + 10
    while looked < 32 and time.monotonic() < give_up:
        time.sleep(0.01)
    assert looked == 32
    batches.close()


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
    monkeypatch.setattr(backend_module, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_ranks)
    spec = ViewSpec(32, 2, True, True, False, batch_size=4, device=torch.device("cpu"), threads=threads, **PLAIN)
    assert spec.num_threads == expected


class StubbornBackend:
    """Cannot decode one file, whose header it reads."""

    refused = ""

    def __init__(self, spec):
        self.spec = spec

    def run(self, requests):
        for request in requests:
            if self.refused in request.paths:
                raise DecodeError(request.paths, RuntimeError("decoder"))
            yield request, [torch.zeros(len(request.paths), 3, 8, 8)]

    def parses(self, path):
        return True

    def undecodable(self, paths):
        return [path for path in paths if path == self.refused]

    def close(self):
        pass


def test_a_file_that_only_pillow_decodes_is_copied_wherever_it_is_named(manifest, monkeypatch):
    """Also where a list of labeled images names it twice."""
    monkeypatch.setattr(feed_module, "make_backend", lambda loader, spec: StubbornBackend(spec))
    monkeypatch.setattr(StubbornBackend, "refused", manifest.paths[0])
    stream = EvalStream([*manifest.paths[:3], manifest.paths[0]], [0, 1, 2, 3], size=8, batch_size=3, **PLAIN)
    with pytest.warns(UserWarning, match=r"00\.png: DALI does not decode it"):
        labels = [label.tolist() for _, label in stream]
    assert labels == [[0, 1, 2], [3]]
    stream.close()


def test_a_failure_that_is_no_files_fault_names_the_images_under_way(manifest, monkeypatch):
    monkeypatch.setattr(feed_module, "make_backend", lambda loader, spec: StubbornBackend(spec))
    monkeypatch.setattr(StubbornBackend, "refused", manifest.paths[0])
    monkeypatch.setattr(StubbornBackend, "undecodable", lambda self, paths: [])
    with pytest.raises(DecodeError, match=r"(?s)decoder.*under way were: .*00\.png"):
        list(EvalStream(manifest.paths[:3], size=8, **PLAIN))


def test_a_missing_dali_is_said_once_and_an_asked_for_one_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(feed_module, "_said_missing", False)
    monkeypatch.setattr(feed_module.importlib, "util", types.SimpleNamespace(find_spec=lambda name: None))
    assert [feed_module.resolve_loader("auto") for _ in range(2)] == ["torch", "torch"]
    assert capsys.readouterr().err.count("DALI is not installed") == 1
    with pytest.raises(ValueError, match=r"data.loader='dali' needs DALI; pip install nvidia-dali-cuda130"):
        feed_module.resolve_loader("dali")


def test_links_are_followed_but_not_for_ever(tmp_path, manifest):
    (tmp_path / "a" / "b").mkdir(parents=True)
    os.link(manifest.paths[0], tmp_path / "a" / "b" / "one.png")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "a" / ".hidden").mkdir()
    os.link(manifest.paths[0], tmp_path / "a" / ".hidden" / "two.png")
    (tmp_path / "other").symlink_to(os.path.dirname(manifest.paths[0]))
    assert len(list_images(str(tmp_path))) == 1 + 20


def test_source_images_that_are_target_images_are_left_out(manifest):
    folder = os.path.dirname(manifest.paths[0])
    root = os.path.dirname(folder)
    joined = Manifest.build(folder, root, fraction=1.0)
    assert (joined.num_target, joined.num_source) == (20, 30) and len(set(joined.paths)) == 50
    with pytest.raises(ValueError, match="holds target images only"):
        Manifest.build(folder, folder)


def test_another_json_file_is_no_manifest(tmp_path):
    (tmp_path / "other.json").write_text('{"paths": 3}')
    with pytest.raises(ValueError, match="no manifest of fastuft"):
        Manifest.load(tmp_path / "other.json")


@pytest.fixture
def replayed(manifest, tmp_path):
    """A target and six originals of the source; ``build`` makes the manifest and gives the source's paths."""
    for name in ("originals", "target"):
        (tmp_path / name).mkdir()
    for path in manifest.paths[:6]:
        os.link(path, tmp_path / "originals" / os.path.basename(path))
    os.link(manifest.paths[7], tmp_path / "target" / "x.png")

    def build(cache=tmp_path / "cache"):
        folders = str(tmp_path / "target"), str(tmp_path / "originals")
        return Manifest.build(*folders, fraction=1.0, replay_cache=str(cache)).paths[1:]

    return types.SimpleNamespace(originals=tmp_path / "originals", cache=tmp_path / "cache", build=build)


def test_the_replay_cache_follows_changed_originals_and_survives_a_cut_index(replayed):
    copies = replayed.build()
    stamps = [os.stat(path).st_mtime_ns for path in copies]
    changed = replayed.originals / "02.png"
    changed.unlink()
    changed.write_bytes(b"x" * 2000)
    index = replayed.cache / "index.jsonl"
    index.write_text(index.read_text() + '["cut off')
    for _ in range(2):  # what is noted behind the cut line is found again
        assert replayed.build() == copies
        again = [os.stat(path).st_mtime_ns for path in copies]
        assert [a != b for a, b in zip(stamps, again, strict=True)] == [False, False, True, False, False, False]
        index_lines = index.read_text().splitlines()
    assert len(index_lines) == 6 + 1 + 1  # the first copies, the cut line, the changed one
    assert Path(copies[2]).read_bytes() == b"x" * 2000


def test_a_copy_that_differs_or_cannot_be_written_stops_and_names_the_file(replayed, monkeypatch):
    whole = Path.read_bytes

    def flaky(self):
        return whole(self)[:-1] if self.name.endswith(".partial") else whole(self)

    monkeypatch.setattr(Path, "read_bytes", flaky)
    with pytest.raises(ValueError, match=r"data.replay_cache=.*0\d\.png cannot be copied \(the copy differs"):
        replayed.build()
    assert list(replayed.cache.glob("*.partial"))  # never under the name of a whole copy
    monkeypatch.undo()
    assert [Path(path).read_bytes() for path in replayed.build()] == [
        path.read_bytes() for path in sorted(replayed.originals.iterdir())
    ]
    assert not list(replayed.cache.glob("*.partial"))

    def full(self, content):
        raise OSError(28, "No space left on device")

    (replayed.originals / "03.png").touch()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"03\.png cannot be copied \(No space left on device\); free space"):
        replayed.build()


def test_a_replay_cache_that_cannot_be_a_folder_is_refused(replayed):
    with pytest.raises(ValueError, match=r"data.replay_cache='.*02\.png' cannot be written .*name a folder"):
        replayed.build(replayed.originals / "02.png")


def test_an_unreadable_original_is_left_to_the_rule_for_bad_files(replayed):
    (replayed.originals / "04.png").unlink()
    (replayed.originals / "04.png").symlink_to("nowhere.png")
    paths = replayed.build()
    assert paths[4] == str(replayed.originals / "04.png") and str(replayed.cache) in paths[5]


COPIER = """
import sys
from fastuft.data import Manifest
print("ready", flush=True)
sys.stdin.readline()
Manifest.build(sys.argv[1], sys.argv[2], fraction=1.0, replay_cache=sys.argv[3])
"""


@pytest.mark.slow
def test_copying_survives_kills_and_ranks_copy_once(tmp_path):
    """A process is killed again and again while it copies; then three at once finish, each file copied by one."""
    generator = np.random.default_rng(0)
    for folder, count in (("target", 1), ("source", 3000)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            (tmp_path / folder / f"{index:04d}.png").write_bytes(generator.bytes(20_000))
    cache = tmp_path / "cache"

    def start():
        arguments = [str(tmp_path / "target"), str(tmp_path / "source"), str(cache)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", COPIER, *arguments], **pipes)
        assert process.stdout.readline() == "ready\n"
        return process

    def go(process):
        process.stdin.write("\n")
        process.stdin.flush()

    def copied():
        return len((cache / "index.jsonl").read_text().splitlines()) if (cache / "index.jsonl").exists() else 0

    for wanted in (200, 700, 1500):
        process = start()
        go(process)
        while copied() < wanted and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert wanted <= copied() < 3000
    processes = [start() for _ in range(3)]
    for process in processes:
        go(process)
    assert [process.wait() for process in processes] == [0, 0, 0]
    lines = (cache / "index.jsonl").read_text().splitlines()
    assert 3000 <= len(lines) <= 3000 + 3  # a kill may cut a line off
    manifest = Manifest.build(str(tmp_path / "target"), str(tmp_path / "source"), fraction=1.0, replay_cache=str(cache))
    for original, copy in zip(sorted((tmp_path / "source").iterdir()), manifest.paths[1:], strict=True):
        assert Path(copy).parent == cache and Path(copy).read_bytes() == original.read_bytes()


@pytest.mark.slow
def test_a_large_tree_is_scanned_quickly_and_cached(tmp_path, monkeypatch):
    """Rates for 100,000 files, printed; a million at this rate takes well under a minute."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in range(100):
        place = tmp_path / "tree" / f"n{folder:08d}"
        place.mkdir(parents=True)
        for index in range(1000):
            os.close(os.open(place / f"{index:06d}.JPEG", os.O_CREAT | os.O_WRONLY))
    seconds, busy = [], []
    for _ in range(2):
        begin, begin_busy = time.perf_counter(), time.process_time()
        files = list_images(str(tmp_path / "tree"))
        seconds.append(time.perf_counter() - begin)
        busy.append(time.process_time() - begin_busy)
        assert len(files) == 100_000 and files == sorted(files)
    rates = [
        f"{1e5 / s:,.0f} files/s ({1e5 / b:,.0f} a second of processor time)"
        for s, b in zip(seconds, busy, strict=True)
    ]
    print(f"scan {rates[0]}, cached {rates[1]}")
    assert busy[0] < 2 and seconds[0] < 6  # a million in a minute, whatever else the machine does
    assert busy[1] < busy[0]
    begin = time.perf_counter()
    built = Manifest.build(files[0], str(tmp_path / "tree"), fraction=0.1)
    print(f"manifest of the tree: {time.perf_counter() - begin:.1f} s")
    assert built.num_source == 10_000
    (tmp_path / "tree" / "n00000007" / "new.jpg").touch()
    assert len(list_images(str(tmp_path / "tree"))) == 100_001


WORKER = """
import json, sys
from fastuft.config import DataConfig
from fastuft.data import SMALL_IMAGES, Manifest, TrainStream
place, epochs = sys.argv[1], int(sys.argv[2])
log = open(place + "/log.jsonl", "a+")
log.seek(0)
done = [json.loads(line) for line in log.read().splitlines() if line.endswith("}")]
epoch, step = (done[-1]["epoch"], done[-1]["step"] + 1) if done else (0, 0)
manifest = Manifest.load(place + "/manifest.json")
data = DataConfig(batch_size=8, drop_last=False, threads=1, loader="dali")
stream = TrainStream(manifest, data, SMALL_IMAGES, seed=0, mean=(0.0,) * 3, std=(1.0,) * 3)
for epoch in range(epoch, epochs):
    for batch in stream.epoch(epoch, step):
        digest = float(batch.query.double().sum() + batch.key.double().sum())
        row = {"epoch": epoch, "step": batch.step, "index": batch.index.tolist(), "digest": digest}
        log.write(json.dumps(row) + "\\n")
        log.flush()
    step = 0
"""


@pytest.mark.slow
def test_soak_with_kills_covers_every_epoch_exactly(manifest, tmp_path):
    """200 epochs in a process that is killed every few epochs and resumed: each image once an epoch, pixels as in an
    uninterrupted run.
    """
    manifest.save(tmp_path / "manifest.json")
    (tmp_path / "log.jsonl").touch()
    generator = random.Random(0)
    epochs, kills = 200, 0

    def rows():
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    while True:
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(epochs)])
        stop_at = len(rows()) + generator.randint(20, 60)
        while worker.poll() is None and len(rows()) < stop_at:
            time.sleep(0.002)
        if worker.poll() is not None:
            assert worker.returncode == 0
            break
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        kills += 1
        text = (tmp_path / "log.jsonl").read_text()
        (tmp_path / "log.jsonl").write_text(text[: text.rfind("\n") + 1])  # a checkpoint is whole or not there
    seen = {epoch: [] for epoch in range(epochs)}
    for row in rows():
        seen[row["epoch"]] += row["index"]
    assert all(sorted(indices) == list(range(35)) for indices in seen.values())
    assert kills >= 15
    stream = make(manifest, drop_last=False)
    by_step = {(row["epoch"], row["step"]): row["digest"] for row in rows()}
    stream.seed = 0
    for epoch in range(0, epochs, 10):
        for batch in stream.epoch(epoch):
            digest = float(batch.query.double().sum() + batch.key.double().sum())
            assert by_step[epoch, batch.step] == digest


@pytest.mark.parametrize("strong", [None, StrongConfig()], ids=["moco", "strong"])
def test_the_pipeline_of_a_gpu_is_well_formed(strong):
    """Without a GPU too: arguments that DALI's operators do not have, or parameters of views on the GPU, are refused."""
    pytest.importorskip("nvidia.dali")
    from fastuft.data.dali import _view_pipeline

    spec = ViewSpec(
        size=32,
        num_views=2,
        color=True,
        blur=True,
        rotation=True,
        batch_size=4,
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        largest=(500, 375),
        strong=strong,
        **PLAIN,
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


def test_results_are_bound_to_the_consumers_stream(manifest, monkeypatch):
    """DALI's ``run`` takes the stream by position only; as a keyword it would be an input of the pipeline."""
    pytest.importorskip("nvidia.dali")
    stream = make(manifest)
    backend = stream._feed._backend
    outputs, streams = backend._pipeline.outputs, []
    monkeypatch.setattr(backend, "_device_id", 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    monkeypatch.setattr(backend._pipeline, "outputs", lambda stream: (streams.append(stream), outputs())[1])
    batches = list(stream.epoch(0))
    assert streams[: len(batches)] == [("stream of", 3)] * len(batches)
    for ours, theirs in zip(batches, make(manifest).epoch(0), strict=True):
        assert torch.equal(ours.query, theirs.query)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_views_agree_with_the_cpu(jpegs, dtype):
    pytest.importorskip("nvidia.dali")
    device = torch.device("cuda", torch.cuda.current_device())
    data = DataConfig(batch_size=8, loader="dali")
    there = TrainStream(jpegs, data, SMALL_IMAGES, seed=5, device=device, dtype=dtype, **PLAIN)
    for ours, theirs in zip(there.epoch(0), make(jpegs).epoch(0), strict=True):
        assert ours.query.device == device and ours.query.dtype == dtype
        assert ours.query.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours.index, theirs.index)
        difference = (ours.query.float().cpu() - theirs.query).abs()
        assert difference.mean() < 0.01


@pytest.mark.gpu
def test_gpu_views_do_not_make_the_host_wait(jpegs):
    pytest.importorskip("nvidia.dali")
    device = torch.device("cuda", torch.cuda.current_device())
    data = DataConfig(batch_size=8, loader="dali")
    stream = TrainStream(jpegs, data, SMALL_IMAGES, seed=5, device=device, **PLAIN)
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
        return list(TrainStream(jpegs, data, SMALL_IMAGES, **options, **PLAIN).epoch(0))

    for whole, *halves in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        assert torch.equal(torch.cat([half.query for half in halves]), whole.query)
