"""Presets on the command line: the defaults follow the network, and what is given wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastuft.cli.commands import COMMANDS
from fastuft.cli.parsing import build_parser
from fastuft.config import TrainConfig, family_of, preset_options


def parse(parser: Any, arguments: Sequence[str], name: str) -> Any:
    """Parse the options of a command; where a preset has other defaults, once more with those.

    Args:
        parser: of the command.
        arguments: of the program, the command's name among them.
        name: of the command.

    Returns:
        What was parsed; ``optim.preset`` names the preset that was used, never auto, and none where it sets nothing.

    Raises:
        UsageError: the arguments do not parse.
    """
    silent = [argument for argument in arguments if not argument.startswith("--print_config")]
    parsed = parser.parse_args(silent)
    values: dict[str, Any] = {}
    if COMMANDS[name].config is TrainConfig and all(_is_group(parsed[name][group]) for group in ("model", "optim")):
        preset, arch, epochs = parsed[name].optim.preset, parsed[name].model.arch, parsed[name].optim.epochs
        family = family_of(arch) if preset == "auto" else preset
        for familys_own in (True, False):  # another optimizer may have been asked for, with values of its own
            chosen = None if familys_own else parsed[name].optim.optimizer
            wanted = {} if family == "none" else preset_options(family, arch, epochs, chosen)
            if wanted != values:
                values, parser = wanted, build_parser([name], wanted)
                parsed = parser.parse_args(silent)
        parsed[name].optim.preset = family if values else "none"
    if len(silent) < len(arguments):
        parser.parse_args(arguments)  # prints what was parsed, and exits
    return parsed


def _is_group(value: Any) -> bool:
    """Whether a group of options was given as one; anything else is refused later, in words."""
    from jsonargparse import Namespace

    return isinstance(value, Namespace)
