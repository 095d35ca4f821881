"""Recognizes a file by its first bytes, before anything reads it as a checkpoint."""

from __future__ import annotations

import zipfile
from enum import Enum
from pathlib import Path

_HEAD = 4096  # bytes to read
_SHORTEST = 16  # bytes of the shortest possible checkpoint

# The format of torch.save before 1.6, which begins with a pickle of this number.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_FOREIGN = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"/annex/objects/": "a git-annex pointer, not the file itself; fetch it with `git annex get`",
    b"\x93NUMPY": "one NumPy array without names; save named arrays with np.savez, or a state_dict with torch.save",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as written by Keras; convert it to safetensors or to a torch state_dict first",
    b"GGUF": "a GGUF file with a quantized language model; name a checkpoint of an image network",
    b"\x89PNG": "an image; name a checkpoint",
    b"\xff\xd8\xff": "an image; name a checkpoint",
    b"%PDF": "a PDF document; name a checkpoint",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it and name the checkpoint inside",
    b"Rar!": "a RAR archive; unpack it and name the checkpoint inside",
}


class FileFormat(Enum):
    """The formats that can be read."""

    SAFETENSORS = "safetensors"
    TORCH = "torch archive"
    TORCH_LEGACY = "torch archive in the old format"
    NUMPY = "NumPy archive"


def _zip_format(path: Path) -> FileFormat | str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return f"a truncated or damaged archive ({path.stat().st_size} bytes); copy or download it again"
    if names and all(name.endswith(".npy") for name in names):
        return FileFormat.NUMPY
    if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
        return "a TorchScript program, not just weights; save the state_dict of the loaded program with torch.save"
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return FileFormat.TORCH
    return "a ZIP archive without a checkpoint's members; unpack it and name the checkpoint inside"


def _text_kind(head: bytes) -> str | None:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return (
            "a web page (HTML), which servers send instead of the file if a login or another address is needed; download "
            "the file itself"
        )
    if b'"weight_map"' in head and start.startswith(b"{"):
        return "the index of a checkpoint in several files; name the folder with the index, config.json and the shards"
    if start.startswith((b"{", b"[")):
        return "JSON text, which has no weights; name the file or the folder with the weights"
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # otherwise it is a character cut off at the end
            return None
        text = head[: error.start].decode("utf-8")
    printable = all(letter.isprintable() or letter in "\t\r\n" for letter in text)
    return "text, which has no weights; name the checkpoint itself" if printable else None


def _foreign_kind(head: bytes, name: str, size: int) -> str:
    """A description of a file that is not a checkpoint."""
    if size < _SHORTEST:
        return f"{'empty' if not size else f'only {size} bytes long'}; copy or download it again"
    for start, (kind, tool) in _COMPRESSED.items():
        if head.startswith(start):
            return f"compressed with {kind}; unpack it first ({tool} {name})"
    for start, kind in _FOREIGN.items():
        if head.startswith(start):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it and name the checkpoint inside"
    if head[:1] == b"\x80" and 2 <= head[1] <= 5:
        return (
            "a pickle, which is not read because it could run code; if you trust it, save its state_dict with torch.save or "
            "safetensors"
        )
    if not any(head):
        return "filled with zeros, as after an interrupted download; copy or download it again"
    return _text_kind(head) or "of an unknown format; name a .safetensors, a torch .pth or a NumPy .npz file"


def sniff(path: Path) -> FileFormat:
    """The format of a checkpoint file, from its content alone.

    Raises:
        ValueError: the file is anything else; the message says what it is and what to do.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD)
    found: FileFormat | str
    if head.startswith(b"PK\x03\x04"):
        found = _zip_format(path)
    elif size >= _SHORTEST and head[8:9] == b"{":
        header = int.from_bytes(head[:8], "little")
        cut = 8 + header > size
        found = (
            f"a truncated safetensors file ({size} bytes); copy or download it again" if cut else FileFormat.SAFETENSORS
        )
    elif head.startswith(_LEGACY_TORCH):
        found = FileFormat.TORCH_LEGACY
    else:
        found = _foreign_kind(head, path.name, size)
    if isinstance(found, str):
        raise ValueError(f"checkpoint {str(path)!r} is {found}")
    return found
