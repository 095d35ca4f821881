"""The parser of the command line, and the normal form of its arguments."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, NoReturn, get_args, get_origin

from fastuft.cli.commands import COMMANDS, Command
from fastuft.cli.complaints import UsageError
from fastuft.cli.described import option_texts, option_types
from fastuft.nested import flattened
from fastuft.version import VERSION

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def build_parser(
    names: Sequence[str] = tuple(COMMANDS), defaults: Mapping[str, object] | None = None
) -> ArgumentParser:
    """The parser with the named sub-commands; building all of them costs start-up time.

    Args:
        names: names of the sub-commands.
        defaults: defaults that replace the commands' own.
    """
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        """Raises instead of printing its whole usage, so that only the message is shown."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UsageError(message) from ex

    parser = Parser(
        prog="fastuft",
        description="Unsupervised finetuning of pretrained image backbones.",
        version=VERSION,
    )
    subcommands = parser.add_subcommands()
    for name in names:
        command = COMMANDS[name]
        summary = command.summary[0].upper() + command.summary[1:]
        child = Parser(description=f"{summary}.", epilog=f"Example: {command.example}")
        child.add_argument(
            "--config", action="config", help="YAML file of options; later options override earlier ones"
        )
        if command.positional is not None:
            _add_positional(child, command)
        child.add_class_arguments(command.config, skip={command.positional} if command.positional else set())
        child.set_defaults({**command.defaults, **(defaults or {})})
        subcommands.add_subcommand(name, child, help=command.summary)
    return parser


def _add_positional(parser: ArgumentParser, command: Command) -> None:
    """Make one option of the dataclass positional, with the help from its docstring."""
    option = next(field for field in fields(command.config) if field.name == command.positional)
    text = option_texts(command.config).get(option.name, "")
    if option.default is MISSING:
        parser.add_argument(option.name, nargs="+", help=text)
    else:
        parser.add_argument(option.name, nargs="?", default=option.default, help=text)


def words(options: Mapping[str, object], command: Command) -> list[str]:
    """Python values as the equivalent words of the command line; values in a file of options come first, so others win."""
    flags: list[str] = []
    positional: list[object] = []
    for name, given in sorted(flattened(options), key=lambda option: option[0] != "config"):
        value = _plain(given)
        if name == command.positional:
            positional += value if isinstance(value, list) else [value]
        else:
            flags.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return [*map(str, positional), *flags]


def _plain(value: object) -> object:
    """A value as JSON can hold it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple | set | range):
        return [_plain(item) for item in value]
    # NumPy and torch scalars become Python numbers.
    return value.item() if hasattr(value, "item") else value


def normalized(arguments: Sequence[str], command: Command | None) -> list[str]:
    """Arguments in the form that the parser takes.

    ``--max-steps`` means ``--max_steps``; a bare ``--runtime.compile`` means true; a comma-separated list or pair needs no
    brackets.
    """
    types = {} if command is None else option_types(command.config)
    given = list(arguments)
    result: list[str] = []
    while given:
        argument = given.pop(0)
        if not argument.startswith("--"):
            result.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        name = f"{name}_" if f"{name}_" in types else name  # if the name is a Python keyword
        kind = types.get(name)
        if kind is bool and not equals:
            positional = command is not None and command.positional is not None
            bare = not given or given[0].startswith("--") or (positional and given[0] not in ("true", "false"))
            equals, value = "=", "true" if bare else given.pop(0)
        elif get_origin(kind) in (list, tuple):
            if not equals and given:
                equals, value = "=", given.pop(0)
            if equals and not value.startswith("["):
                items = value.split(",")
                member = get_args(kind)[0]
                text = member is str or isinstance(next(iter(get_args(member)), None), str)
                value = json.dumps(items) if text else f"[{','.join(items)}]"
        result.append(f"--{name}{equals}{value}")
    return result
