"""Presets on the command line: defaults follow the network, and given options win."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastuft.cli.commands import COMMANDS
from fastuft.cli.parsing import build_parser
from fastuft.config import TrainConfig, family_of, preset_options


def parse(parser: Any, arguments: Sequence[str], name: str) -> Any:
    """Parse the options of a command, with the defaults of the preset that suits its network.

    Args:
        parser: parser of the command.
        arguments: arguments of the program, including the name of the command.
        name: name of the command.

    Returns:
        The parsed options. ``optim.preset`` names the preset that was used: none if it sets nothing, never auto.

    Raises:
        UsageError: the arguments do not parse.
    """
    silent = [argument for argument in arguments if not argument.startswith("--print_config")]
    parsed = parser.parse_args(silent)
    values: dict[str, Any] = {}
    if COMMANDS[name].config is TrainConfig and all(_is_group(parsed[name][group]) for group in ("model", "optim")):
        preset, arch, epochs = parsed[name].optim.preset, parsed[name].model.arch, parsed[name].optim.epochs
        family = family_of(arch) if preset == "auto" else preset
        for familys_own in (True, False):  # the user may have chosen another optimizer, which has its own values
            chosen = None if familys_own else parsed[name].optim.optimizer
            wanted = {} if family == "none" else preset_options(family, arch, epochs, chosen)
            if wanted != values:
                values, parser = wanted, build_parser([name], wanted)
                parsed = parser.parse_args(silent)
        parsed[name].optim.preset = family if values else "none"
    if len(silent) < len(arguments):
        parser.parse_args(arguments)  # prints the configuration and exits
    return parsed


def _is_group(value: Any) -> bool:
    """Whether a group of options is a group; anything else is refused later with a message."""
    from jsonargparse import Namespace

    return isinstance(value, Namespace)
