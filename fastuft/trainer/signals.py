"""Preemption: the first signal asks the run to save and stop, a second one of the same kind kills it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_PREEMPTED = 85  # exit status of a run that was asked to stop and saved its state; schedulers requeue on it


def under_torchelastic() -> bool:
    """Whether torchrun's agent started this process: it takes any status but 0 for a failure, and starts the ranks anew."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class StopSignals:
    """While active, SIGTERM, SIGUSR1, SIGINT and SIGHUP set ``received`` instead of ending the process.

    A SIGHUP that is ignored from the start stays so: ``nohup`` means that the run outlives its terminal.
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
