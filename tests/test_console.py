"""Console output when nobody reads it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastuft import console
from fastuft.console import say

TALKS = """
import os, sys
from fastuft.console import say
error = sys.argv[1] == "error"
for number in range(3):
    say(f"line {number}", error=error)
    if number == 0:
        sys.stdin.read()  # until the reader has exited
print("a plain line", file=sys.stderr if error else sys.stdout)
"""


NOTES = """
import sys
from fastuft.messages import note
note("line 0")
sys.stdin.read()
note("line 1")
"""


@pytest.mark.parametrize("stream", ["output", "error"])
def test_a_closed_pipe_ends_nothing(stream):
    pipes = {"stdout" if stream == "output" else "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", TALKS, stream], stdin=subprocess.PIPE, text=True, **pipes)
    reader = process.stdout or process.stderr
    assert reader.readline() == "line 0\n"
    reader.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def test_each_part_of_a_job_has_its_own_bar(monkeypatch, capsys):
    monkeypatch.setattr(console, "watched", lambda: True)
    with console.shown_parts() as show:
        show("features", 5, 10)
        show("features", 10, 10)
        show("few-shot runs", 1, 3)
    shown = capsys.readouterr().err
    assert "features: 100%" in shown and "10/10" in shown and "few-shot runs" in shown and "1/3" in shown


def test_no_bar_is_drawn_without_a_terminal(capsys):
    with console.shown_parts() as show, console.shown_progress("image") as count:
        show("features", 1, 2)
        count(1, 2)
    assert capsys.readouterr() == ("", "")


def test_notes_to_a_closed_pipe_end_nothing():
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", NOTES], text=True, **pipes)
    assert process.stderr.readline() == "line 0\n"
    process.stderr.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def test_control_characters_in_messages_are_escaped(capsys):
    say("eins \x1b[2Jzwei\rdrei\a\nvier fünf\udcff\u202e")
    assert capsys.readouterr().out == "eins \\x1b[2Jzwei\\rdrei\\x07\nvier fünf\\xff\\u202e\n"
