"""Explains in one line why a command line does not parse.

The parser only reports that it failed. The cause is found here from the types of the options: each argument and each entry of a
configuration file is checked in turn, and a value is tried in a parser that has only this option.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path

from fastuft.cli.commands import COMMANDS, Command
from fastuft.cli.described import allowed_values, option_types

_NUMBER = re.compile(r"-\.?\d")
_OWN = ("help", "version", "print_config")  # options of every parser, which set no value


class UsageError(Exception):
    """The command line does not parse."""


@dataclass(frozen=True)
class _Given:
    """An option and its value, from an argument or a file; MISSING if the argument has none."""

    name: str
    value: object
    added: bool = False  # --name+ adds to a list


def complaint(error: Exception, arguments: Sequence[str], command: Command | None) -> str:
    """One line that names the option, its value and what is allowed; the parser's own message if no cause is found.

    Args:
        error: the parser's error.
        arguments: arguments of the program, including the name of the command.
        command: the command; None if none was named.
    """
    text = " ".join(str(error).split())
    if command is None:
        named = next((argument for argument in arguments if not argument.startswith("-")), None)
        return text if named is None else f"unknown command {named!r}; choose one of {', '.join(COMMANDS)}"
    words = list(arguments)
    words.remove(next(name for name, known in COMMANDS.items() if known is command and name in words))
    types = option_types(command.config)
    said: set[str] = set()
    try:
        for given in _walk(words, command, types):
            _check(given, types)
            (said.discard if given.value is None else said.add)(given.name)  # a later null removes a value
    except UsageError as found:
        return str(found)
    required = [o.name for o in fields(command.config) if o.default is MISSING and o.default_factory is MISSING]
    missing = [name for name in required if name not in said]
    if missing:
        taken = "; ".join(f"{name} takes {allowed_values(types[name])}" for name in missing)
        return f"missing {', '.join(missing)}: {taken}. Example: {command.example}"
    return text


def _walk(words: Sequence[str], command: Command, types: Mapping[str, object]) -> Iterator[_Given]:
    """The options of a command line, with those of the files that it names."""
    most = 0  # words without an option's name
    if command.positional is not None:
        positional = next(option for option in fields(command.config) if option.name == command.positional)
        most = len(words) if positional.default is MISSING else 1
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--" or not word.startswith("--"):
            if word == "--" or most == 0:
                raise UsageError(
                    f"unexpected argument {word!r}; options are given as --NAME VALUE, several values as "
                    f"--NAME '[A, B]'. Example: {command.example}"
                )
            most -= 1
            yield _Given(command.positional or "", MISSING)
            continue
        name, equals, text = word[2:].partition("=")
        name, added = name.removesuffix("+"), name.endswith("+")
        if name in _OWN:
            continue
        if name == command.positional:
            raise UsageError(f"{name} is given without its name, as in the example: {command.example}")
        value: object = text if equals else MISSING
        if not equals and left and (not left[0].startswith("-") or _NUMBER.match(left[0])):
            value = left.pop(0)
        if name == "config" and isinstance(value, str):
            yield from _of_file(value, types)
        elif value is MISSING and (name in types or name == "config"):
            raise UsageError(f"{name} needs a value; it takes {allowed_values(types.get(name, str))}")
        elif isinstance(value, str) and is_dataclass(types.get(name)):
            yield from _of_group(name, value, types)
        else:
            yield _Given(name, value, added)


def _of_file(file: str, types: Mapping[str, object]) -> Iterator[_Given]:
    content = _yaml(Path(file).read_text(encoding="utf-8")) if Path(file).is_file() else None
    if isinstance(content, Mapping):
        yield from _of_tree(content, "", types)
    elif content is not None:
        raise UsageError(f"config is not a YAML mapping of options: {content}")


def _of_group(name: str, text: str, types: Mapping[str, object]) -> Iterator[_Given]:
    file = Path(text)
    content = _yaml(file.read_text(encoding="utf-8") if text and file.is_file() else text)
    if isinstance(content, Mapping):
        yield from _of_tree(content, f"{name}.", types)
    else:
        yield _Given(name, text)


def _yaml(text: str) -> object:
    """The value of a YAML text, as the parser loads it; the reason as text if it is not YAML."""
    import yaml
    from jsonargparse import get_loader

    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError as error:
        return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())


def _of_tree(tree: Mapping[object, object], prefix: str, types: Mapping[str, object]) -> Iterator[_Given]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and is_dataclass(types.get(name)):
            yield _Given(name, MISSING)
            yield from _of_tree(value, f"{name}.", types)
        else:
            yield _Given(name, value)


def _check(given: _Given, types: Mapping[str, object]) -> None:
    """Raise UsageError if there is no such option, or if it does not take the value."""
    name, value = given.name, given.value
    if name not in types:
        known = [option for option, kind in types.items() if not is_dataclass(kind)]
        close = difflib.get_close_matches(name, known, 3, 0.4)
        allowed = f"closest: {', '.join(close)}" if close else f"allowed: {', '.join(known)}"
        raise UsageError(f"unknown option {name!r}; {allowed}")
    kind = types[name]
    if value is MISSING:
        return
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    if is_dataclass(kind):
        raise UsageError(
            f"{name}={shown} is not allowed; it takes {allowed_values(kind)}: give them one by one, as in "
            f"--{name}.{fields(kind)[0].name} VALUE, or name a YAML file that holds them"
        )
    if not _takes(kind, given):
        raise UsageError(f"{name}={shown} is not allowed; it takes {allowed_values(kind)}")


def _takes(kind: object, given: _Given) -> bool:
    """Whether a parser with only an option of this type accepts the value."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        if isinstance(given.value, str):
            parser.parse_args([f"--value{'+' if given.added else ''}={given.value}"])
        else:
            parser.parse_object({"value": given.value})
    except ArgumentError:
        return False
    return True
