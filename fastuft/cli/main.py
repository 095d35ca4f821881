"""The entry point: parse, build the configuration, run the sub-command, turn errors into one line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from fastuft.cli.actions import EXIT_FAILED
from fastuft.cli.commands import COMMANDS
from fastuft.cli.complaints import UsageError, complaint
from fastuft.cli.described import allowed_values
from fastuft.cli.help import command_help, front_page
from fastuft.cli.parsing import build_parser, normalized, words
from fastuft.cli.presets import parse
from fastuft.console import ensure_standard_streams, say
from fastuft.names import printable

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # the status that shells report for a program ended by Ctrl-C
PACKAGE = Path(__file__).resolve().parents[1]


def _without_parser(arguments: Sequence[str]) -> int:
    """What works without the extra packages: the doctor, which says how to get them."""
    if arguments and arguments[0] == "doctor":
        from fastuft.cli.doctor import print_findings

        return print_findings(as_json="--json" in arguments)
    print(
        "fastuft: error: the command line needs jsonargparse and the other packages of an extra: "
        "pip install 'fastuft[train-cu13]' (or -cu12, -cpu); `fastuft doctor` says what is missing",
        file=sys.stderr,
    )
    return EXIT_BAD_INPUT


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show the program's own warnings as one line, without the location in its code."""
    usual = warnings.formatwarning

    def shown(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if Path(filename).is_relative_to(PACKAGE):
            return f"fastuft: warning: {printable(str(message))}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _help(arguments: Sequence[str]) -> int | None:
    """Print the help that ``help [COMMAND] [GROUP]`` or ``--help [GROUP]`` asks for; None if no help is asked for."""
    flag = next((index for index, argument in enumerate(arguments) if argument in ("-h", "--help")), None)
    if arguments and arguments[0] == "help":
        words = list(arguments[1:])
    elif flag is not None:
        words = [word for word in arguments[:1] if word in COMMANDS] + list(arguments[flag + 1 : flag + 2])
    elif arguments:
        return None
    else:
        words = []
    name, topic = [*words, None, None][:2]
    if name is None:
        say(front_page())
        return 0
    if name not in COMMANDS:
        say(f"fastuft: error: unknown command {name!r}; choose one of {', '.join(COMMANDS)}", error=True)
        return EXIT_BAD_INPUT
    try:
        say(command_help(name, None if topic is None or topic.startswith("-") else topic))
    except ValueError as error:
        say(f"fastuft {name}: error: {error}", error=True)
        return EXIT_BAD_INPUT
    return 0


def _instance(parser: ArgumentParser, parsed: Namespace, name: str) -> Any:
    """The command's configuration; a ValueError if its values do not fit together."""
    from jsonargparse import Namespace

    command = COMMANDS[name]
    for option, kind in get_type_hints(command.config).items():
        if is_dataclass(kind) and not isinstance(parsed[name][option], Namespace):
            raise ValueError(f"{option}={parsed[name][option]!r} is not allowed; it takes {allowed_values(kind)}")
    config = parser.instantiate(parsed)[name]
    return command.config(**{field.name: config[field.name] for field in fields(command.config)})


def configured(name: str, options: Mapping[str, object]) -> Any:
    """A command's configuration from Python values: the same defaults, checks and messages as on the command line.

    Args:
        name: the command.
        options: values by name, nested or dotted; None for an option that accepts it.

    Raises:
        ValueError: an unknown option, or a value that is not allowed.
    """
    command = COMMANDS[name]
    parser = build_parser([name])
    arguments = [name, *words(options, command)]
    try:
        parsed = parse(parser, arguments, name)
    except UsageError as error:
        raise ValueError(complaint(error, arguments, command)) from error
    return _instance(parser, parsed, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status.

    An error that a user can cause is one line on stderr, with status 2 for input that is refused and 1 for a file that
    cannot be read or written. Anything else is a defect of the program and keeps its traceback.
    """
    # Read when torch loads its threading runtime: threads that spin while they wait make a run on a CPU many times slower
    # as soon as decoding threads or other processes want the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    ensure_standard_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    helped = _help(arguments)
    if helped is not None:
        return helped
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    command = COMMANDS.get(named or "")
    try:
        parser = build_parser([named] if named is not None and command is not None else tuple(COMMANDS))
    except ModuleNotFoundError as error:
        if error.name != "jsonargparse":
            raise
        return _without_parser(arguments)
    label = "fastuft" if command is None else f"fastuft {named}"
    given = normalized(arguments, command)
    try:
        parsed = parser.parse_args(given) if command is None else parse(parser, given, named or "")
    except UsageError as error:
        say(f"{label}: error: {complaint(error, given, command)}", error=True)
        return EXIT_BAD_INPUT
    assert named is not None and command is not None  # without a command, only help and version parse, and they exit
    try:
        config = _instance(parser, parsed, named)
        with _short_warnings():
            return command.run(config)
    except ValueError as error:
        say(printable(f"{label}: error: {' '.join(str(error).splitlines())}"), error=True)
        return EXIT_BAD_INPUT
    except Warning as warning:
        text = (
            f"{label}: error: {' '.join(str(warning).split())} (a warning, which PYTHONWARNINGS or -W makes an error)"
        )
        say(text, error=True)
        return EXIT_FAILED
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        text = f"{label}: error: {where}{error.strerror}; check the path, its permissions and free space"
        say(printable(text), error=True)
        return EXIT_FAILED
    except KeyboardInterrupt:
        say(f"{label}: interrupted", error=True)
        return EXIT_INTERRUPTED
