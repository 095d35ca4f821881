"""List files, which name images: plain lines, or a table with a column of paths."""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections.abc import Callable

from fastuft.data.reading import read_bytes
from fastuft.names import printable

LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".lst")
_NUMBER_FIRST = re.compile(r"\d+\s+(.+)")
_SEPARATORS = "\t,;"
_MAY_BE_MORE = re.compile(r"[\t,;]|^\d+\s")  # the line may have more than one name
_WORDS = re.compile(r"[\w ]*")
_COLUMN = re.compile(r"(image|file|path|name|id)\w*", re.IGNORECASE)
_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def read_list(path: str, is_image: Callable[[str], bool], images_of: Callable[[str], list[str]]) -> list[str]:
    """Absolute paths of the images named by a list, in order.

    Each line names an image, relative to the list file. Empty lines and lines that begin with # are skipped. Labels beside
    the path (after white space, or in other columns of a table) are ignored, as is a first line of column names. A line that
    names a folder stands for its images. Text is in UTF-8 or in the encoding of file names; UTF-16 with a byte order mark is
    read too.

    Args:
        path: the list file.
        is_image: whether a name has the suffix of an image.
        images_of: returns the images of a folder.

    Raises:
        ValueError: a line does not name exactly one image, or is not text; the message gives its number.
    """
    folder = os.path.dirname(path)
    found: list[str] = []
    first = True
    for number, line in enumerate(_text(path).split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{printable(path)}, line {number}"
        if "\0" in line:
            raise ValueError(f"{where}: has a NUL byte; save the list as UTF-8 text with one path per line")
        names = _images_in(line, folder, is_image)
        if len(names) > 1:
            raise ValueError(f"{where}: names several images ('{printable(line)}'); write one per line")
        entry = os.path.join(folder, names[0] if names else line)
        if names or os.path.isfile(entry):
            found.append(entry)
        elif os.path.isdir(entry):
            found += images_of(entry)
        elif not (first and _names_columns(line)):
            raise ValueError(
                f"{where}: '{printable(line)}' does not name an image; write one path per line, relative to the list file, "
                "optionally with a label after white space or a comma"
            )
        first = False
    return found


def _text(path: str) -> str:
    data = read_bytes(path)
    for mark, encoding in _BOMS.items():
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "surrogateescape" if encoding == "utf-8" else "replace")
    return os.fsdecode(data)


def _images_in(line: str, folder: str, is_image: Callable[[str], bool]) -> list[str]:
    """The names of images in a line, usually one."""
    if is_image(line) and (not _MAY_BE_MORE.search(line) or os.path.lexists(os.path.join(folder, line))):
        return [line]
    for separator in _SEPARATORS:
        names = [field for field in _fields(line, separator) if is_image(field)]
        if names and separator in line:
            return names
    numbered = _NUMBER_FIRST.fullmatch(line)  # "3 cat.jpg"
    name = (numbered[1] if numbered else line).strip("'\"")
    while not is_image(name) and " " in (name := name.rpartition(" ")[0].rstrip()):
        pass
    return [name] if is_image(name) else []


def _fields(line: str, separator: str) -> list[str]:
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])]
    except csv.Error:
        return []


def _names_columns(line: str) -> bool:
    """Whether a line without an image may be the heading of a table."""
    for separator in _SEPARATORS:
        if separator in line:
            return all(_WORDS.fullmatch(field) for field in _fields(line, separator))
    return _COLUMN.fullmatch(line) is not None
