"""Names from other people's files: as part of a path, and as text."""

from __future__ import annotations

import hashlib
import re

_MAX_BYTES = 200  # per part of a path: file systems allow 255, and a writer adds its own suffix
_MAX_ENDING = 12  # the length of ".safetensors"
# Characters with a special meaning for some file system or shell.
_SPECIAL = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')


def safe_name(name: str) -> str:
    """A name as one part of a path: never in another folder, never hidden, never too long.

    A name that is already safe stays as it is. Any other is rewritten with a digest of the original, so that different
    names stay different: ``a/b.png`` becomes ``a_b-2ab48bff.png`` beside ``a_b.png``.

    Args:
        name: the name found in an archive, a list or a checkpoint.
    """
    plain = _SPECIAL.sub("_", name.encode(errors="replace").decode()).strip(" .")
    if plain == name and 0 < len(name.encode()) <= _MAX_BYTES:
        return name
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    stem, point, ending = plain.rpartition(".")
    if not stem or len(ending) > _MAX_ENDING or not ending.isalnum():
        stem, point, ending = plain, "", ""
    kept = stem.encode()[: _MAX_BYTES - len(f"-{digest}{point}{ending}".encode())].decode(errors="ignore")
    return f"{kept or 'unnamed'}-{digest}{point}{ending}"


def printable(name: str) -> str:
    """A name as one line of text that every terminal, log and page can show.

    Bytes that are not UTF-8, line ends and control characters are shown as escapes.
    """
    return "".join(c if c.isprintable() else _escape(c) for c in name)


def _escape(character: str) -> str:
    code = ord(character)
    # How Python represents a byte that is not UTF-8.
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()
