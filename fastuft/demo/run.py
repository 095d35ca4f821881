"""The demo from images to report: its runs side by side, one processor each, then the table of results."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import wait
from pathlib import Path
from typing import TextIO

import torch

from fastuft.atomic import write_whole
from fastuft.console import say
from fastuft.data import processors
from fastuft.demo.arms import ARMS, PRETRAINED, RAW_PIXELS, Demo
from fastuft.demo.images import write_demo_images
from fastuft.report import accuracy_table, load_run, table, write_report
from fastuft.runfolder import RunFolder


def run_demo(
    out: str,
    *,
    seeds: int = 1,
    first_seed: int = 0,
    pretrain_epochs: int = 20,
    finetune_epochs: int = 40,
    shots: Sequence[int] = (1, 2, 4, 8),
    trials: int = 1,
    num_glyphs: int = 8000,
) -> Path:
    """Write the images, train and evaluate every arm for every seed, then print the table and write the report.

    As many runs as there are processors work at once, each in a process with one thread. Finished runs in ``out`` are kept and
    interrupted ones resume, so more seeds can be added later. All seeds share the images; each has its own pretraining, from
    which all of its arms start. ``table.md`` has the accuracies in Markdown.

    Args:
        out: folder for everything.
        seeds: repetitions.
        first_seed: seed of the first repetition.
        pretrain_epochs: epochs on the source.
        finetune_epochs: epochs of each arm.
        shots: labeled images per class of the few-shot runs.
        trials: draws per few-shot figure.
        num_glyphs: source images.

    Returns:
        The path of the report.

    Raises:
        ValueError: ``out`` has a demo with other settings.
    """
    started = time.perf_counter()
    root = Path(out)
    _same_settings(
        root,
        pretrain_epochs=pretrain_epochs,
        finetune_epochs=finetune_epochs,
        shots=list(shots),
        trials=trials,
        num_glyphs=num_glyphs,
    )
    say(f"writing {num_glyphs} glyphs and the digits to {root / 'images'}")
    folders = write_demo_images(root / "images", num_glyphs=num_glyphs)
    demo = Demo(root, folders, pretrain_epochs, finetune_epochs, tuple(shots), trials)
    numbers = range(first_seed, first_seed + seeds)
    _run_all(demo, numbers)
    runs = [(name, demo.folder(seed, name)) for seed in numbers for name in (RAW_PIXELS, PRETRAINED, *ARMS)]
    say("")
    say(table(runs))
    accuracies = accuracy_table([load_run(*run) for run in runs])
    assert accuracies is not None  # the raw pixels have figures
    write_whole(root / "table.md", accuracies.markdown().encode())
    report = root / "report.html"
    notes = [
        f"Source: {num_glyphs} rendered glyphs, on which a small network is pretrained. Target: scikit-learn's handwritten "
        "digits, 500 for unlabeled training and as the gallery, 1,297 for test. SDR replays 10 % of the glyphs; Mix trains "
        "on CutMix queries. Labels are used only for evaluation.",
        f"Seeds: {', '.join(map(str, numbers))}. No result was left out.",
    ]
    write_report(report, runs, title="fastuft demo: from glyphs to handwritten digits", notes=notes)
    say(f"report:     {report}")
    say(f"table:      {root / 'table.md'}")
    say(f"checkpoint: {RunFolder(demo.folder(first_seed, '+ SDR + Mix')).backbone_file}")
    say(f"time:       {time.perf_counter() - started:.0f} s")
    return report


def _same_settings(root: Path, **settings: object) -> None:
    """Record the settings of a folder, and refuse to mix its figures with those of other settings."""
    kept = root / "demo.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else settings
    changed = [f"{name} {before.get(name)!r}" for name, value in settings.items() if before.get(name) != value]
    if changed:
        raise ValueError(
            f"out={str(root)!r} has a demo with {', '.join(changed)}; continue with the same settings, or choose another out"
        )
    root.mkdir(parents=True, exist_ok=True)
    write_whole(kept, json.dumps(settings).encode())


def _run_all(demo: Demo, seeds: Sequence[int]) -> None:
    """Run every seed's pretraining, then its arms; the first failure or Ctrl-C stops the others at a saved step."""
    with ProcessPoolExecutor(
        min(processors(), len(seeds) * (1 + len(ARMS))), multiprocessing.get_context("spawn"), _start_worker
    ) as pool:
        try:
            pretrainings = {pool.submit(_work, seed, PRETRAINED, demo.train): seed for seed in seeds}
            others: list[Future[None]] = [pool.submit(demo.evaluate_pixels, seed) for seed in seeds]
            for done in as_completed(pretrainings):
                done.result()
                seed = pretrainings[done]
                # In reverse order, the longest arms come first, so that none of them is left for the end.
                others += [pool.submit(_work, seed, arm, demo.train, demo.evaluate) for arm in reversed(ARMS)]
                others.append(pool.submit(_work, seed, PRETRAINED, demo.evaluate))
            for done in as_completed(others):
                done.result()
        except BrokenProcessPool as error:
            raise SystemExit(
                "a process was killed, perhaps for lack of memory; run the demo again to continue"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    """Use one thread: a network this small gains little from a second, and figures do not depend on the number of cores."""
    torch.set_num_threads(1)
    # Ctrl-C reaches every process: a training saves and stops with its own handler, an evaluation finishes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(seed: int, name: str, *parts: Callable[[int, str], None]) -> None:
    """Do the parts of one run's work in order."""
    label = f"seed {seed}, {name}"
    with redirect_stdout(_Labeled(label, sys.stdout)), redirect_stderr(_Labeled(label, sys.stderr)):
        for part in parts:
            part(seed, name)


class _Labeled(io.TextIOBase):
    """Text whose lines begin with the name of their run. It is not a terminal, because several bars would be unreadable."""

    def __init__(self, label: str, stream: TextIO) -> None:
        self._label, self._stream = label, stream
        self._line_begins = True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self._stream.write(f"[{self._label}] {line}" if self._line_begins else line)
            self._line_begins = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
