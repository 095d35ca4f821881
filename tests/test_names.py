"""Arbitrary names as path components and as text."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastuft.names import printable, safe_name

ANY = st.text(st.characters(), max_size=400)


@pytest.mark.parametrize("name", ["a.png", "class 1", "日本", "n01440764_10026.JPEG", "a-b_c.tar"])
def test_plain_names_stay_as_they_are(name):
    assert safe_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/", "../../etc/passwd", "/etc/passwd", "C:\\x", ".hidden", "a\0b", "a\nb"]
)
def test_other_names_become_plain_names(name):
    assert safe_name(name) != name
    assert "/" not in safe_name(name) and safe_name(name).strip(".") != ""


def test_similar_names_stay_distinct():
    assert len({safe_name(name) for name in ("a/b.png", "a_b.png", "a\\b.png", "a:b.png", "a//b.png")}) == 5
    assert safe_name("a/b.png").endswith(".png")


@given(ANY)
def test_every_name_becomes_one_path_component(tmp_path_factory, name):
    safe = safe_name(name)
    assert safe_name(safe) == safe
    assert os.path.basename(safe) == safe not in ("", ".", "..") and len(safe.encode()) <= 200
    folder = tmp_path_factory.mktemp("names")
    (folder / safe).write_bytes(b"")
    assert os.listdir(folder) == [safe]


@given(ANY)
def test_every_name_is_shown_on_one_line(name):
    shown = printable(name)
    assert shown.isprintable() and shown.encode().decode() == shown


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a b.png", "a b.png"), ("\udcff.png", r"\xff.png"), ("a\nb", r"a\nb"), ("\x1b[2J", r"\x1b[2J"), ("日本", "日本")],
)
def test_unprintable_characters_are_escaped(name, shown):
    assert printable(name) == shown
