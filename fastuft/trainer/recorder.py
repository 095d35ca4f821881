"""The output of a run: metrics.jsonl, TensorBoard, Weights & Biases, a progress bar or plain lines."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastuft import console
from fastuft.config import RuntimeConfig
from fastuft.names import printable
from fastuft.runfolder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_SLOW = 20.0  # seconds of the first row from which its rate is believed


def check_writers(runtime: RuntimeConfig) -> None:
    """Check that the chosen writers are installed, on every rank before any work starts.

    Raises:
        ValueError: Weights & Biases was chosen and is not installed.
    """
    if runtime.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("runtime.wandb=True needs wandb; pip install wandb, or leave it off")


class Recorder:
    """Writes on the main rank and is silent on others. ``earlier`` has the rows from before the run was resumed.

    Args:
        folder: the run folder.
        runtime: which writers to use.
        enabled: whether this is the main rank.
        total_steps: steps of the run, for the progress bar.
        resumed_step: step of the checkpoint that the run resumes from, or 0. Later rows are dropped from metrics.jsonl,
            because they will be written again.
    """

    def __init__(
        self, folder: RunFolder, runtime: RuntimeConfig, *, enabled: bool, total_steps: int, resumed_step: int
    ) -> None:
        self.enabled = enabled
        self._board: SummaryWriter | None = None
        self._wandb: Any = None
        self._bar: console.Bar | None = None
        self._last_line = 0.0
        self._estimated = False
        self._rows, self._before = 0, resumed_step  # rows so far, and the last one's step
        self._total = total_steps
        self.earlier: list[dict[str, Any]] = []
        if not enabled:
            return
        # A run that begins again keeps no rows, not even the evaluation before its first step.
        self.earlier = [row for row in folder.read_metrics() if row["step"] <= resumed_step] if resumed_step else []
        folder.write_metrics(self.earlier)
        self._path = folder.metrics_file
        self._file = self._path.open("a", encoding="utf-8")
        if runtime.tensorboard:
            self._board = self._tensorboard(folder.path, resumed_step)
        if runtime.wandb:
            import wandb

            self._wandb = wandb.init(
                project="fastuft",
                dir=str(folder.path),
                name=folder.path.name,
                id=self._wandb_id(folder.path),
                resume="allow",
            )
        if console.watched():
            self._bar = console.progress_bar(total_steps, unit="step", initial=resumed_step)

    def _tensorboard(self, folder: Path, resumed_step: int) -> SummaryWriter | None:
        missing = None
        if importlib.util.find_spec("tensorboard") is None:
            missing = "TensorBoard is not installed"
        elif not str(folder).isprintable():  # it has bytes that are not characters
            missing = "TensorBoard cannot write to a folder with this name"
        if missing is not None:
            self.say(f"{missing}: metrics go only to metrics.jsonl.")
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def _wandb_id(self, folder: Path) -> str:
        """An id that stays the same when a run is resumed."""
        path = folder / "wandb_id.txt"
        if not path.exists():
            path.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()

    def write(self, row: dict[str, Any]) -> None:
        """Write one row of metrics: ``kind``, ``step`` and figures, or mappings of figures.

        Raises:
            OSError: it could not be written; rows after the last checkpoint are dropped on resume anyway.
        """
        if not self.enabled:
            return
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            remedy = f"{error.strerror}; free some disk space and continue with resume=auto"
            raise OSError(error.errno, remedy, str(self._path)) from error
        figures = dict(_figures(row["kind"], row))
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(figures, step=row["step"])

    def progress(self, row: dict[str, Any]) -> None:
        """Show one row of training metrics on the progress bar, or as a line now and then."""
        if not self.enabled:
            return
        self._estimate(row)
        with self._terminal():
            if self._bar is not None:
                self._bar.n = row["step"]
                self._bar.set_postfix_str(
                    f"epoch {row['epoch']}, loss {row['loss']:.3f}, {row['images_per_second']:.0f} img/s, "
                    f"data wait {row['data_wait_share']:.0%}"
                )
                return
        now = time.monotonic()
        if now - self._last_line > 10 or row["step"] >= self._total:
            self._last_line = now
            left = (self._total - row["step"]) * row["seconds_per_step"]
            console.say(
                f"epoch {row['epoch']}  step {row['step']}/{self._total}  loss {row['loss']:.4f}  lr {row['lr']:.3g}  "
                f"{row['images_per_second']:.0f} img/s  data wait {row['data_wait_share']:.0%}  left {left / 60:.1f} min"
            )

    def _estimate(self, row: dict[str, Any]) -> None:
        """Once, from the measured rate: how long the run takes. The first steps are slower, and count only if they are slow."""
        each, left = row["seconds_per_step"], self._total - row["step"]
        passed = each * (row["step"] - self._before)
        self._rows, self._before = self._rows + 1, row["step"]
        if self._estimated or left <= 0 or (self._rows == 1 and passed < _SLOW):
            return
        self._estimated = True
        end = time.strftime("%H:%M", time.localtime(time.time() + each * left))
        self.say(
            f"{each:.3g} s per step: {_duration(each * left)} left for {left} steps, until {end}; looks come on top"
        )

    def say(self, text: str) -> None:
        """Print a line for the user, once, on the main rank."""
        if not self.enabled:
            return
        with self._terminal():
            if self._bar is not None:
                self._bar.write(printable(text))
                return
        console.say(text)

    def close(self) -> None:
        if not self.enabled:
            return
        with suppress(OSError):  # a full disk was reported when the row was written
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        with self._terminal():
            if self._bar is not None:
                self._bar.close()

    @contextmanager
    def _terminal(self) -> Iterator[None]:
        """If the terminal is gone, drop the progress bar and continue."""
        try:
            yield
        except OSError:
            self._bar = None
            console.silence(sys.stderr)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _figures(prefix: str, row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(path, value) of each figure in a row."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _figures(f"{prefix}/{name}", value)
        elif isinstance(value, float):
            yield f"{prefix}/{name}", value


class PartTimes:
    """The times of a step's parts: device events on a GPU, the clock on a CPU; read only when metrics are written."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def _now(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begin a step."""
        self._marks.append(("", self._now()))

    def mark(self, part: str) -> None:
        """Count the work issued since the last mark as ``part``."""
        self._marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by part since the last read; on a GPU the host waits for the last mark."""
        seconds: dict[str, float] = {}
        if self._marks and isinstance(last := self._marks[-1][1], torch.cuda.Event):
            last.synchronize()
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            if part:
                seconds[part] = seconds.get(part, 0.0) + _seconds_between(before, after)
        self._marks.clear()
        return seconds


def _seconds_between(before: torch.cuda.Event | float, after: torch.cuda.Event | float) -> float:
    if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
        milliseconds: float = before.elapsed_time(after)
        return milliseconds / 1000
    assert isinstance(before, float) and isinstance(after, float)
    return after - before
