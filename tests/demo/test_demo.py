"""The demo at its smallest size: images depend only on the seed, every arm runs, a second call has nothing left to do."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastuft.demo import run
from fastuft.demo.arms import ARMS, PRETRAINED, RAW_PIXELS, arm_config
from fastuft.demo.images import CHARACTERS, FONT_STEMS, write_demo_images


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_demo_images(tmp_path_factory.mktemp("images"), num_glyphs=124)


def test_demo_images_have_the_expected_classes_and_splits(folders):
    glyphs = sorted(Path(folders.source).rglob("*.png"))
    assert len(glyphs) == 124 and len({path.parent.name.lower() for path in glyphs}) == len(CHARACTERS) == 62
    train, test = (sorted(Path(folder).rglob("*.png")) for folder in (folders.train, folders.test))
    assert (len(train), len(test)) == (500, 1297)
    assert not {path.name for path in train} & {path.name for path in test}
    for path in (glyphs[0], train[0]):
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (32, 32) and pixels.max() > 100 > pixels[0, 0]


def test_fonts_ship_with_matplotlib():
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    assert [stem for stem in FONT_STEMS if not (fonts / f"{stem}.ttf").is_file()] == []


def test_images_are_fixed_by_their_seed(folders, tmp_path):
    again = write_demo_images(tmp_path, num_glyphs=124)
    for name in ("source", "train"):
        first, second = (sorted(Path(getattr(f, name)).rglob("*.png")) for f in (folders, again))
        assert [p.name for p in first] == [p.name for p in second]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first[::20], second[::20], strict=True))


def test_the_matched_arm_takes_as_many_steps_as_replaying(folders, tmp_path):
    matched = arm_config("naive, same steps as + SDR", folders, tmp_path, tmp_path / "a", 0, 40)
    plain = arm_config("naive", folders, tmp_path, tmp_path / "b", 0, 40)
    assert plain.optim.epochs == 40
    # 500 targets and 12 replayed glyphs make 4 steps of 128 an epoch, 500 alone make 3
    assert matched.optim.epochs == round(40 * 4 / 3)


def test_figures_of_other_settings_are_not_reused(tmp_path, monkeypatch):
    reached = RuntimeError("the work began")

    def begin(*_, **__):
        raise reached

    monkeypatch.setattr(run, "write_demo_images", begin)
    for _ in range(2):  # the same settings continue
        with pytest.raises(RuntimeError, match="the work began"):
            run.run_demo(str(tmp_path), trials=2)
    with pytest.raises(ValueError, match=r"has a demo with shots \[1, 2, 4, 8\], trials 2; .* choose another out"):
        run.run_demo(str(tmp_path), trials=3, shots=[1])


def test_lines_name_their_run():
    lines = io.StringIO()
    labeled = run._Labeled("seed 0, naive", lines)
    assert not labeled.isatty()
    print("epoch 1", 2, file=labeled)
    print("two\nlines", file=labeled, flush=True)
    expected = ["epoch 1 2", "two", "lines"]
    assert lines.getvalue().splitlines() == [f"[seed 0, naive] {line}" for line in expected]


def gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.e2e
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_demo_leaves_no_processes(tmp_path, how):
    options = ["--out", str(tmp_path), "--num-glyphs", "310", "--pretrain-epochs", "1000"]
    command = "import sys\nfrom fastuft.cli import main\nsys.exit(main(sys.argv[1:]))"
    demo = subprocess.Popen(
        [sys.executable, "-c", command, "demo", *options],
        start_new_session=True,
        # A job in the background starts with Ctrl-C ignored, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    checkpoints = tmp_path / "seed0" / PRETRAINED / "checkpoints"
    try:
        until(lambda: list(checkpoints.glob("*.pt")))
        if how == signal.SIGINT:  # as a terminal sends it
            os.killpg(demo.pid, how)
        else:
            demo.send_signal(how)
        assert demo.wait(120) == (130 if how == signal.SIGINT else -how)
        until(lambda: gone(demo.pid))
    finally:
        if not gone(demo.pid):
            os.killpg(demo.pid, signal.SIGKILL)


@pytest.mark.e2e
def test_the_demo_runs_and_is_then_complete(tmp_path, capsys):
    from fastuft.cli import main

    arguments = ["demo", "--out", str(tmp_path), "--pretrain-epochs", "1", "--finetune-epochs", "1", "--shots", "[1]"]
    arguments += ["--num-glyphs", "310"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for row in (PRETRAINED, *ARMS, RAW_PIXELS):
        assert row in printed
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["run", "---", RAW_PIXELS, PRETRAINED, *ARMS]
    assert lines[0].startswith("| run | retrieval % | clustering % | 1-shot means % | 1-shot % | source clustering % |")
    assert list((tmp_path / "features").iterdir())
    page = (tmp_path / "report.html").read_text()
    assert page.count("<script>") == page.count("<script") == 1  # the sorting of tables, within the page
    for arm in (PRETRAINED, "naive", "plus_SDR_plus_Mix"):
        run = tmp_path / "seed0" / arm
        figures = json.loads((run / "eval.json").read_text())
        assert 0 < figures["retrieval"] <= 1 and (run / "backbone.safetensors").exists()
    written = {path: path.read_text() for path in tmp_path.rglob("metrics.jsonl")}
    assert main(arguments) == 0
    assert {path: path.read_text() for path in tmp_path.rglob("metrics.jsonl")} == written
