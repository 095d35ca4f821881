"""Help: the workflow from photos to a report, and each command's options, the important ones first.

The pages are made from the configurations alone, so they appear immediately and need no extra packages.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_origin, get_type_hints

from fastuft.cli.commands import COMMANDS, Command
from fastuft.cli.described import allowed_values, default_of, option_texts, value_text

WIDTH = 100
_FEW = 14  # a command with at most this many options shows all of them
_PATH = (
    ("fastuft doctor", "what this machine has, and what is missing"),
    ("fastuft verify-data photos/", "find files that would stop a run"),
    ("fastuft finetune --init start.pth --target photos/ --out runs/photos", "adapt the backbone"),
    ("fastuft eval --checkpoint runs/photos --before start.pth --train photos/ --out runs/photos/eval", "did it help?"),
    ("open runs/photos/eval/report.html", "the report: before and after, curves, nearest images"),
    ("fastuft export --checkpoint runs/photos --out backbone.pth --layout torchvision", "use the backbone elsewhere"),
)


def front_page() -> str:
    """What `fastuft` without arguments prints: the steps from photos to a report, then every command."""
    lines = ["fastuft adapts a pretrained image backbone to your own unlabeled images.", "", "From photos to a report:"]
    for number, (step, why) in enumerate(_PATH, 1):
        lines += [f"  {number}. {step}", f"       {why}"]
    lines += ["", "No photos at hand? `fastuft demo` does all of this on bundled images, in minutes on a CPU.", ""]
    lines += ["Commands:"]
    lines += [f"  {name:<14}{command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "`fastuft COMMAND --help` shows the options of a command, `fastuft --version` the version."]
    return "\n".join(lines)


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=space, subsequent_indent=space, break_on_hyphens=False)


def _entry(name: str, kind: object, default: str, text: str) -> list[str]:
    text = text.replace("``", "")
    about = f"(type: {allowed_values(kind)}, {'required' if default == 'required' else f'default: {default}'})"
    return [f"  {name}", *_wrapped(f"{text} {about}", 6)]


def _entries(
    config: type, prefix: str, changed: Mapping[str, object], positional: str | None
) -> Iterator[tuple[str, Any]]:
    """(full name, lines) of the options of one dataclass, without groups."""
    texts, kinds = option_texts(config), get_type_hints(config)
    for option in fields(config):
        kind, full = kinds[option.name], prefix + option.name
        if not is_dataclass(kind):
            default = value_text(changed[full]) if full in changed else default_of(option)
            shown = option.name.upper() if full == positional else f"--{full.rstrip('_')}"
            yield full, _entry(shown, kind, default, texts.get(option.name, ""))


def groups_of(command: Command) -> dict[str, type]:
    """Groups of options by their full name, each before the groups nested in it."""

    def walk(config: type, prefix: str) -> Iterable[tuple[str, type]]:
        for name, kind in get_type_hints(config).items():
            if is_dataclass(kind) and isinstance(kind, type):
                yield prefix + name, kind
                yield from walk(kind, f"{prefix}{name}.")

    return dict(walk(command.config, ""))


def _sections(command: Command) -> dict[str, dict[str, list[str]]]:
    """The lines of every option, by group ("" is the top) and full name."""
    groups = {"": command.config, **groups_of(command)}
    return {
        name: dict(_entries(config, f"{name}." if name else "", command.defaults, command.positional))
        for name, config in groups.items()
    }


def _summary_of(group: type) -> str:
    return (group.__doc__ or "").strip().splitlines()[0].replace("``", "")


def command_help(name: str, topic: str | None = None) -> str:
    """The help of one command.

    Args:
        name: the command.
        topic: a group of options, "all", or None for the most important options.

    Raises:
        ValueError: there is no such group.
    """
    command = COMMANDS[name]
    sections, groups = _sections(command), groups_of(command)
    if topic not in (None, "all", *groups):
        raise ValueError(f"help={topic!r} is not allowed; choose one of {', '.join(['all', *groups])}, or omit it")
    usage = f"usage: fastuft {name}"
    if command.positional:
        several = get_origin(get_type_hints(command.config)[command.positional]) is list
        usage += f" {command.positional.upper()}{' ...' if several else ''}"
    lines = [usage + " [--OPTION VALUE ...]", "", f"{command.summary[0].upper()}{command.summary[1:]}.", ""]
    every = {full: entry for section in sections.values() for full, entry in section.items()}
    if topic not in (None, "all"):
        lines += [f"{topic}: {_summary_of(groups[topic])}", *_joined(sections[topic].values())]
    elif topic == "all" or len(every) <= _FEW:
        for group, section in sections.items():
            if section:
                lines += [f"{group}: {_summary_of(groups[group])}" if group else "Options:", *_joined(section.values())]
    else:
        lines += ["The most important options:", *_joined(every[full] for full in command.first)]
        by_group = f"; by group, `fastuft {name} --help GROUP`:" if groups else "."
        lines += [f"All {len(every)} options: `fastuft {name} --help all`{by_group}"]
        lines += [f"  {group:<14}{_summary_of(config)}" for group, config in groups.items()] + [""]
    lines += ["Common to all commands:"]
    lines += ["  --config FILE       read options from a YAML file; later options override earlier ones"]
    lines += ["  --print_config      print the whole configuration as YAML and exit", ""]
    lines += [f"Example: {command.example}", *(f"         {example}" for example in command.more_examples)]
    return "\n".join(lines)


def _joined(entries: Iterable[list[str]]) -> list[str]:
    return [*(line for entry in entries for line in entry), ""]
