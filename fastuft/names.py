"""Names that come from files of others: as part of a path, and as text."""

from __future__ import annotations

import hashlib
import re

_MAX_BYTES = 200  # of one part of a path: file systems allow 255, and a writer adds its own ending
_MAX_ENDING = 12  # characters of ".safetensors"
# What some file system or shell takes for more than a name.
_SPECIAL = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')


def safe_name(name: str) -> str:
    """A name as one part of a path: never another folder, never hidden, never too long.

    A name that is one already stays as it is. Any other is rewritten, with a digest of the original, so that two
    different names stay different: ``a/b.png`` becomes ``a_b-2ab48bff.png`` beside ``a_b.png``.

    Args:
        name: from an archive, a list or a checkpoint.
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
    """A name as text of one line that every terminal, log and page can hold.

    Bytes that are not UTF-8, line ends and control characters are shown as escapes.
    """
    return "".join(c if c.isprintable() else _escape(c) for c in name)


def _escape(character: str) -> str:
    code = ord(character)
    # How Python holds a byte that is not UTF-8.
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()
