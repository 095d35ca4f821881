"""Lines for a person who may have gone."""

from __future__ import annotations

import subprocess
import sys

import pytest

TALKS = """
import os, sys
from fastuft.console import say
error = sys.argv[1] == "error"
for number in range(3):
    say(f"line {number}", error=error)
    if number == 0:
        sys.stdin.read()  # until the reader has gone
print("a plain line", file=sys.stderr if error else sys.stdout)
"""


@pytest.mark.parametrize("stream", ["output", "error"])
def test_a_reader_that_goes_away_ends_nothing(stream):
    pipes = {"stdout" if stream == "output" else "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", TALKS, stream], stdin=subprocess.PIPE, text=True, **pipes)
    reader = process.stdout or process.stderr
    assert reader.readline() == "line 0\n"
    reader.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 0
