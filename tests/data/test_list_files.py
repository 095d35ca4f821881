"""List files: unambiguous lines are read, other lines are errors with their number."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from fastuft.data import list_images


@pytest.fixture
def folder(tmp_path):
    """a.jpg, "b c.png", 3 d.jpg and a folder of two."""
    (tmp_path / "inner").mkdir()
    for name in ("a.jpg", "b c.png", "3 d.jpg", "inner/x.jpg", "inner/y.jpg"):
        (tmp_path / name).touch()
    return tmp_path


def read(folder, content, name="list.txt"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [os.path.relpath(path, folder) for path in list_images(str(folder / name))]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("# mine\n\na.jpg\r\nb c.png\n", ["a.jpg", "b c.png"]),
        ("\ufeffa.jpg\nb c.png", ["a.jpg", "b c.png"]),
        ("a.jpg\nb c.png\n".encode("utf-16"), ["a.jpg", "b c.png"]),
        ("a.jpg 0\nb c.png 1", ["a.jpg", "b c.png"]),
        ("a.jpg 0 1 0\n", ["a.jpg"]),
        ("a.jpg\t7\nb c.png\t2", ["a.jpg", "b c.png"]),
        ("0 a.jpg\n3 d.jpg", ["a.jpg", "3 d.jpg"]),  # the second is a name
        ("inner\na.jpg", ["inner/x.jpg", "inner/y.jpg", "a.jpg"]),
        ("'b c.png'\n", ["b c.png"]),
        ("gone.jpg", ["gone.jpg"]),  # a missing file is the streams' affair
    ],
)
def test_unambiguous_lines_are_read(folder, content, expected):
    assert read(folder, content) == expected


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ('path,label\na.jpg,cat\n"b c.png","dog, small"\n', "list.csv"),
        ("label;image\n1;a.jpg\n2;b c.png\n", "list.csv"),
        ("filename\tclass\na.jpg\t1\nb c.png\t2\n", "list.tsv"),
        ("0\t3.0\ta.jpg\n1\t2.0\tb c.png\n", "list.lst"),
    ],
)
def test_tables_are_read_by_their_column_of_paths(folder, content, name):
    assert read(folder, content, name) == ["a.jpg", "b c.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.jpg\0\n", r"list\.txt, line 1: has a NUL byte; save the list as UTF-8"),
        ("a.jpg\n".encode("utf-16-le"), r"line 1: has a NUL byte"),
        ("a.jpg\n\nnowhere\n", r"list\.txt, line 3: 'nowhere' does not name an image; write one path per line"),
        ("a.jgp\na.jpg", r"line 1: 'a\.jgp' does not name an image"),
        ("a.jpg,b c.png\n", r"line 1: names several images"),
        ("a.jpg\nx\x1b[2J", r"line 2: 'x\\x1b\[2J' does not name an image"),
        ("# nothing\n", "has no images"),
    ],
)
def test_ambiguous_lines_are_named_by_number(folder, content, message):
    with pytest.raises(ValueError, match=message):
        read(folder, content)


def test_a_pipe_is_not_a_list(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(ValueError, match=r"list\.txt: cannot be read \(it is a pipe"):
        list_images(str(tmp_path / "list.txt"))


@pytest.mark.slow
@seed(0)
@settings(max_examples=1500, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=30), st.sampled_from([b"a.jpg", b"inner", b"\xff\xfe", b"\t1", b","]))))
def test_any_content_gives_paths_or_an_error_with_the_line(tmp_path_factory, parts):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "list.txt").write_bytes(b"\n".join(parts))
    try:
        paths = list_images(str(folder / "list.txt"))
    except ValueError as error:
        assert str(folder / "list.txt") in str(error) and str(error).isprintable()
    else:
        assert all(os.path.isabs(path) for path in paths)
