"""Several names in one text: brace expansion as in WebDataset and shells, and glob patterns."""

from __future__ import annotations

import re

_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_PATTERN = re.compile(r"[*?]|\[[^\]]+\]")
_MOST = 1_000_000  # names that one text may expand to


def has_pattern(text: str) -> bool:
    """Whether a text contains ``*``, ``?`` or ``[...]``."""
    return _PATTERN.search(text) is not None


def expand_braces(text: str) -> list[str]:
    """Expand ``{00..09}`` and ``{a,b}``, in order; numbers keep their leading zeros.

    Raises:
        ValueError: a range runs backwards, or there are more than a million names.
    """
    match = _INNERMOST.search(text)
    if match is None:
        return [text]
    inner = match[1]
    span = _RANGE.fullmatch(inner)
    if span is not None:
        first, last = int(span[1]), int(span[2])
        if last < first or last - first >= _MOST:
            raise ValueError(f"'{{{inner}}}' is not a range of shards; write {{FIRST..LAST}}, as in {{000..146}}")
        width = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in inner:
        choices = inner.split(",")
    else:
        before, after = text[: match.end()], expand_braces(text[match.end() :])
        return [before + rest for rest in after]
    found = []
    for choice in choices:
        found += expand_braces(text[: match.start()] + choice + text[match.end() :])
        if len(found) > _MOST:
            raise ValueError(f"'{text}' expands to more than {_MOST:,} names; name a folder or a prefix")
    return found


def pattern(text: str) -> re.Pattern[str]:
    """A glob pattern as a regular expression: ``*`` and ``?`` stay within one folder, ``**`` does not."""
    parts = []
    for token in re.findall(r"\*\*/?|\*|\?|\[[^\]]*\]|.", text, re.DOTALL):
        fixed = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token)
        if fixed is None:
            is_set = len(token) > 2 and token.startswith("[")
            fixed = token.replace("[!", "[^", 1) if is_set else re.escape(token)
        parts.append(fixed)
    return re.compile("".join(parts), re.DOTALL)
