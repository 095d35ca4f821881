"""Output for the user. A closed pipe or terminal never ends the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, Self, TextIO

from fastuft.names import printable


def say(text: str, *, error: bool = False) -> None:
    """Print lines immediately. If nobody reads them (a closed pipe, a terminal that is gone), output is dropped;
    characters that the output's encoding lacks, or that would move a terminal's cursor, are escaped.

    Args:
        text: one line, or several.
        error: on standard error instead of standard output.
    """
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = "\n".join(map(printable, text.split("\n")))
    try:
        print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except (OSError, ValueError):  # a pipe without reader, a terminal without user; a closed file
        silence(stream)


def silence(stream: TextIO) -> None:
    """Discard what is still written to ``stream``, so that neither later lines nor the interpreter's exit fail."""
    with suppress(OSError, ValueError):  # a stand-in without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
    with suppress(OSError, ValueError):
        stream.flush()


def watched() -> bool:
    """Whether somebody sees a progress bar: at a terminal, or in a notebook."""
    if sys.stderr.isatty():
        return True
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")


class Bar(Protocol):
    """What this program uses of a tqdm progress bar."""

    n: int

    def update(self, n: int = 1) -> None: ...
    def set_description_str(self, desc: str) -> None: ...
    def set_postfix_str(self, s: str) -> None: ...
    def write(self, s: str) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


def progress_bar(total: int, *, unit: str, initial: int = 0) -> Bar:
    """A tqdm progress bar, in a notebook of the notebook's own kind; silent if nobody watches."""
    from tqdm.auto import tqdm

    bar: Bar = tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True, disable=not watched())
    return bar


@contextmanager
def shown_progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total), each call of which updates a progress bar."""
    bars: list[Bar] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(progress_bar(total, unit=unit))
        bars[0].update(done - bars[0].n)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()


@contextmanager
def shown_parts() -> Iterator[Callable[[str, int, int], None]]:
    """A function of (part, done, total) whose calls move a bar; each part of a job has its own bar."""
    bars: dict[str, Bar] = {}

    def show(part: str, done: int, total: int) -> None:
        if part not in bars:
            bars[part] = progress_bar(total, unit="")
            bars[part].set_description_str(part)
        bars[part].update(done - bars[part].n)
        if done >= total:
            bars[part].close()

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def ensure_standard_streams() -> None:
    """Open standard streams that lead nowhere for a process that was started with closed ones.

    Otherwise the next files that it opens get their numbers, and what a library writes to standard error lands in them.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
