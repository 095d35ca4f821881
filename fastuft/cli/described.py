"""The options: their types, texts and allowed values, read from the annotations and docstrings of the configurations."""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Literal, get_args, get_origin, get_type_hints

_ENTRY = re.compile(r"^(\w+): (.*)$")


def option_types(config: type, prefix: str = "") -> dict[str, object]:
    """The type of every option by its full name; groups come before their members."""
    types: dict[str, object] = {}
    for name, kind in get_type_hints(config).items():
        types[prefix + name] = kind
        if is_dataclass(kind) and isinstance(kind, type):
            types |= option_types(kind, f"{prefix}{name}.")
    return types


def option_texts(config: type) -> dict[str, str]:
    """What the docstring says about each field, as one line each."""
    texts: dict[str, str] = {}
    name = ""
    _, _, arguments = (config.__doc__ or "").partition("Args:\n")
    for line in arguments.splitlines():
        entry = _ENTRY.match(line[8:]) if line.startswith(" " * 8) and not line.startswith(" " * 12) else None
        if entry:
            name, texts[entry[1]] = entry[1], entry[2]
        elif name and line.strip():
            texts[name] += f" {line.strip()}"
    return texts


def allowed_values(kind: object) -> str:
    """A description of the values that an option of this type takes."""
    plain = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    if kind in plain:
        return plain[kind]
    if is_dataclass(kind):
        return f"a group of {', '.join(field.name for field in fields(kind))}"
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if get_origin(kind) is tuple and parts[1:] == (...,):
        return f"a list, each item {allowed_values(parts[0])}"
    if get_origin(kind) is tuple:
        return f"[{', '.join(map(allowed_values, parts))}]"
    if get_origin(kind) is list:
        return f"a list, each item {allowed_values(parts[0])}"
    return " or ".join(map(allowed_values, parts))


def default_of(option: Field[object]) -> str:
    """The default as it would be given on the command line; "required" if there is none."""
    if option.default_factory is not MISSING:
        value = option.default_factory()
    elif option.default is not MISSING:
        value = option.default
    else:
        return "required"
    return value_text(value)


def value_text(value: object) -> str:
    """A value as it is given on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"[{', '.join(map(value_text, value))}]" if isinstance(value, list | tuple) else str(value)
