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
    parsed = parser.parse_args(arguments)
    if COMMANDS[name].config is not TrainConfig or not all(_is_group(parsed[name][g]) for g in ("model", "optim")):
        return parsed
    options = parsed[name].optim
    if options.preset == "none":
        return parsed
    arch, epochs = parsed[name].model.arch, options.epochs
    family = family_of(arch) if options.preset == "auto" else options.preset
    values = preset_options(family, arch, epochs)
    if values:
        parsed = build_parser([name], values).parse_args(arguments)
    other = preset_options(family, arch, epochs, parsed[name].optim.optimizer)
    if other != values:  # another optimizer was asked for
        parsed = build_parser([name], other).parse_args(arguments)
    parsed[name].optim.preset = family if other else "none"
    return parsed


def _is_group(value: Any) -> bool:
    """Whether a group of options was given as one; anything else is refused later, in words."""
    from jsonargparse import Namespace

    return isinstance(value, Namespace)
