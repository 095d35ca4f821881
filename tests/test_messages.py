"""Notes are printed once, by one process of a run."""

from __future__ import annotations

from fastuft import messages
from fastuft.messages import note


def test_a_note_is_printed_once_by_the_first_rank(monkeypatch, capsys):
    monkeypatch.setattr(messages, "_said", set())
    for _ in range(2):
        note("something")
    monkeypatch.setenv("RANK", "1")
    note("something else")
    assert capsys.readouterr().err == "something\n"
