"""Help pages: the workflow from photos to a report, and options in order of importance."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import typing

import pytest

from fastuft.cli import main
from fastuft.cli.commands import COMMANDS
from fastuft.cli.described import default_of, option_texts, option_types
from fastuft.cli.help import command_help, front_page, groups_of


def page(capsys, *arguments):
    """The output of a call for help."""
    assert main(list(arguments)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("arguments", [(), ("help",), ("--help",), ("-h",)])
def test_bare_fastuft_shows_the_workflow_and_every_command(capsys, arguments):
    text = page(capsys, *arguments)
    assert text.strip() == front_page()
    steps = [line.split("fastuft ")[1].split()[0] for line in text.splitlines() if ". fastuft " in line]
    assert steps == ["doctor", "verify-data", "finetune", "eval", "export"]
    assert all(f"  {name} " in text for name in COMMANDS)


def test_the_workflow_commands_parse(monkeypatch):
    calls = []
    for name, command in list(COMMANDS.items()):
        monkeypatch.setitem(COMMANDS, name, dataclasses.replace(command, run=lambda config: calls.append(config) or 0))
    steps = [line.split(". ", 1)[1] for line in front_page().splitlines() if ". fastuft " in line]
    assert all(main(shlex.split(step)[1:]) == 0 for step in steps) and len(calls) == 5


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_short_help_fits_two_screens_with_types_defaults_and_examples(capsys, name):
    text = page(capsys, name, "--help")
    assert "(type: " in text and f"Example: {COMMANDS[name].example}" in text
    assert len(text.splitlines()) <= 80 and max(map(len, text.splitlines())) <= 130
    assert text == page(capsys, "help", name)


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("completion", "SHELL [--OPTION VALUE ...]"),
        ("report", "RUNS ... [--OPTION VALUE ...]"),
        ("demo", "[--OPTION VALUE ...]"),
    ],
)
def test_usage_shows_how_many_values_an_option_takes(name, usage):
    assert command_help(name).splitlines()[0] == f"usage: fastuft {name} {usage}"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_all_shows_every_option_in_full(name):
    command = COMMANDS[name]
    text = " ".join(command_help(name, "all").split())
    for full, kind in option_types(command.config).items():
        if not dataclasses.is_dataclass(kind):
            assert (f"--{full.rstrip('_')} " if full != command.positional else full.upper()) in text, full
    for config in (command.config, *groups_of(command).values()):
        kinds = typing.get_type_hints(config)
        for option, about in option_texts(config).items():
            assert dataclasses.is_dataclass(kinds[option]) or " ".join(about.replace("``", "").split()) in text, option


@pytest.mark.parametrize("name", sorted(name for name, command in COMMANDS.items() if command.first))
def test_the_first_shown_options_exist(name):
    assert set(COMMANDS[name].first) <= set(option_types(COMMANDS[name].config))


def test_help_shows_a_group_of_options(capsys):
    text = page(capsys, "finetune", "--help", "optim")
    assert "--optim.weight_decay" in text and "--data.batch_size" not in text
    assert "default: 0.24)" in " ".join(page(capsys, "pretrain", "--help", "optim").split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("finetune", "--help", "speed"), ["help='speed' is not allowed", "all, model, method"]),
        (("help", "finetuen"), ["unknown command 'finetuen'", "finetune, pretrain"]),
    ],
)
def test_unknown_topics_give_a_one_line_error(capsys, arguments, words):
    assert main(list(arguments)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words)


def test_help_texts_and_defaults_come_from_the_class():
    @dataclasses.dataclass
    class Options:
        """Some options.

        Args:
            one: a text that goes on
                in a second line: with a colon.
            two: another.
        """

        one: str
        two: list[bool | None] = dataclasses.field(default_factory=lambda: [True, None])

    # A docstring inside a function is indented by one step more than one at the top of a module.
    Options.__doc__ = Options.__doc__.replace("\n    ", "\n")
    assert option_texts(Options) == {"one": "a text that goes on in a second line: with a colon.", "two": "another."}
    assert [default_of(option) for option in dataclasses.fields(Options)] == ["required", "[true, null]"]


def test_completion_offers_the_options_of_the_command(tmp_path):
    pytest.importorskip("shtab")
    bash = shutil.which("bash") or pytest.skip("no bash")
    script = tmp_path / "completion.bash"
    done = subprocess.run([sys.executable, "-m", "fastuft.cli", "completion", "bash"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script.write_text(done.stdout)
    ask = f"source {script}; COMP_WORDS=(fastuft finetune --optim.w); COMP_CWORD=2; _shtab_fastuft; echo ${{COMPREPLY[@]}}"
    done = subprocess.run([bash, "-c", ask], capture_output=True, text=True, env=os.environ)
    assert done.stdout.split() == ["--optim.weight_decay", "--optim.warmup_epochs"], done.stdout + done.stderr


def test_completion_without_shtab_names_the_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)  # importing it raises ModuleNotFoundError
    assert main(["completion"]) == 2
    assert "fastuft[completion]" in capsys.readouterr().err
