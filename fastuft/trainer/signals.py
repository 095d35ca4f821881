"""Preemption: the first signal makes the run save and stop; a second signal of the same kind kills it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_PREEMPTED = 85  # exit status of a run that was asked to stop and saved a checkpoint; schedulers requeue on it


def under_torchelastic() -> bool:
    """Whether torchrun's agent started this process; it takes any status but 0 for a failure and restarts the ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class StopSignals:
    """While active, makes SIGTERM, SIGUSR1, SIGINT and SIGHUP set ``received`` instead of ending the process.

    If SIGHUP is already ignored, it stays ignored: ``nohup`` means that the run outlives its terminal.
    """

    _signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._before[signal.Signals(number)])

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
