"""Presets on the command line: defaults follow the network, and given options win."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from fastuft.cli.commands import COMMANDS
from fastuft.cli.parsing import build_parser
from fastuft.config import ModelConfig, TrainConfig, family_of, is_auto, preset_options

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def parse(parser: ArgumentParser, arguments: Sequence[str], name: str) -> Namespace:
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
    values: dict[str, object] = {}
    if COMMANDS[name].config is TrainConfig and all(_is_group(parsed[name][group]) for group in ("model", "optim")):
        network = _network(parsed[name])
        preset, arch, epochs = parsed[name].optim.preset, network["arch"], parsed[name].optim.epochs
        family = family_of(arch) if preset == "auto" else preset
        for familys_own in (True, False):  # the user may have chosen another optimizer, which has its own values
            chosen = None if familys_own else parsed[name].optim.optimizer
            wanted = {} if family == "none" else preset_options(family, arch, epochs, chosen)
            if wanted != values:
                values, parser = wanted, build_parser([name], wanted)
                parsed = parser.parse_args(silent)
        parsed[name].optim.preset = family if values else "none"
        for option, value in network.items():
            parsed[name].model[option] = value
    if len(silent) < len(arguments):
        parser.parse_args(arguments)  # prints the configuration and exits
    return parsed


def _network(options: Namespace) -> dict[str, str]:
    """Arch and stem: as given, else as the checkpoint names them, else the paper's."""
    given = {option: options.model[option] for option in ("arch", "stem")}
    if not any(map(is_auto, given.values())):
        return given
    named: dict[str, str | None] = {}
    if options.init is not None:
        from fastuft.model import named_network

        with suppress(OSError, ValueError):  # the run reads it again and says what is wrong with it
            named = dict(zip(given, named_network(options.init), strict=True))
    papers = ModelConfig()
    return {o: (named.get(o) or getattr(papers, o)) if is_auto(value) else value for o, value in given.items()}


def _is_group(value: object) -> bool:
    """Whether a group of options is a group; anything else is refused later with a message."""
    from jsonargparse import Namespace

    return isinstance(value, Namespace)
