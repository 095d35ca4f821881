"""Parsing, dispatch and errors; each sub-command imports what it needs when it runs."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from fastuft.cli import options
from fastuft.config import EvalConfig, TrainConfig

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

# Read when torch loads its threading runtime: threads that spin while they wait make a CPU run many times slower as soon
# as decoding threads or other processes want the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class UsageError(Exception):
    """The command line does not parse."""


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Args:
        config: dataclass of its options.
        run: takes an instance, returns the exit status.
        summary: one line of help.
        example: shown below the help.
        defaults: values that differ from the dataclass's.
        positional: option given without its name, several times where it is a list.
    """

    config: type
    run: Callable[[Any], int]
    summary: str
    example: str
    defaults: dict[str, Any]
    positional: str | None = None


def _finetune(config: TrainConfig) -> int:
    if config.init is None:
        raise ValueError(
            "init is missing; name the checkpoint to adapt (--init moco_v2_800ep.pth.tar), or use `fastuft pretrain` "
            "to train from scratch"
        )
    return _train(config)


def _train(config: TrainConfig) -> int:
    from fastuft.trainer import EXIT_PREEMPTED, NonFiniteLossError, train

    try:
        result = train(config)
    except NonFiniteLossError as error:
        print(f"fastuft: {error}", file=sys.stderr)
        return EXIT_FAILED
    if result.interrupted:
        print(f"stopped by {result.interrupted} at step {result.steps}; go on with --resume auto", file=sys.stderr)
        return EXIT_PREEMPTED
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{result.run_dir}: {result.steps} steps, {result.bad_files} bad files skipped")
    return 0


def _evaluate(config: EvalConfig) -> int:
    from fastuft.evaluate import evaluate_backbone, write_evaluation
    from fastuft.model import load_backbone
    from fastuft.report import load_run, table, write_report

    backbone = load_backbone(config.checkpoint, config.arch, config.stem)
    known = {"arch": str(backbone.arch), "stem": backbone.stem}
    before = None if config.before is None else load_backbone(config.before, **known)  # type: ignore[arg-type]
    result = evaluate_backbone(backbone, config, before)
    write_evaluation(config.out, result)
    trained = Path(config.checkpoint)
    # The curves of a run join its evaluation.
    runs = [load_run(trained.name or "checkpoint", [config.out, trained] if trained.is_dir() else config.out)]
    print(table(runs))
    for statement in result.metrics["statements"]:
        print(statement)
    write_report(Path(config.out) / "report.html", runs)
    print(f"report: {Path(config.out) / 'report.html'}")
    return 0


def _export(config: options.ExportOptions) -> int:
    from fastuft.model import export

    export(
        config.checkpoint,
        config.out,
        layout=config.layout,
        arch=config.arch,
        stem=config.stem,
        num_classes=config.num_classes,
    )
    print(f"wrote {config.out} in the layout of {config.layout}")
    return 0


def _verify(config: options.VerifyOptions) -> int:
    from tqdm import tqdm

    from fastuft.data import list_images, verify_files, write_bad_list

    paths = list_images(config.paths)
    with tqdm(total=len(paths), unit="file", disable=not sys.stderr.isatty()) as bar:
        bad = verify_files(
            paths,
            decode=config.decode,
            workers=config.workers,
            max_megapixels=config.max_megapixels,
            progress=bar.update,
        )
    for entry in bad[:20]:
        print(f"{entry.path}: {entry.reason}")
    if bad:
        write_bad_list(config.bad_list, bad)
        print(f"{len(bad)} of {len(paths)} files are bad; the list is in {config.bad_list}")
        return 1
    print(f"all {len(paths)} files are good")
    return 0


def _report(config: options.ReportOptions) -> int:
    from fastuft.report import table, write_report

    runs = []
    for entry in config.runs:
        name, separator, folder = entry.partition("=")
        runs.append((name, folder) if separator else (Path(entry).name, entry))
    print(table(runs, config.format))
    write_report(config.out, runs, title=config.title)
    print(f"report: {config.out}")
    return 0


def _doctor(config: options.DoctorOptions) -> int:
    from fastuft.cli.doctor import run_doctor

    return run_doctor(as_json=config.json)


def _demo(config: options.DemoOptions) -> int:
    from fastuft.demo.arms import run_demo

    run_demo(
        config.out,
        seeds=config.seeds,
        first_seed=config.first_seed,
        pretrain_epochs=config.pretrain_epochs,
        finetune_epochs=config.finetune_epochs,
        shots=config.shots,
        trials=config.trials,
    )
    return 0


def _bench(config: options.BenchOptions) -> int:
    folder = Path(__file__).resolve().parents[2] / "bench"
    if not folder.is_dir():
        raise ValueError("bench needs a source checkout: clone the repository and run `fastuft bench` in it")
    known = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    if config.what != "all" and config.what not in known:
        raise ValueError(f"what={config.what!r} is not allowed; choose one of all, {', '.join(known)}")
    target = folder if config.what == "all" else folder / f"bench_{config.what}.py"
    settings = folder.parent / "pyproject.toml"
    command = [sys.executable, "-m", "pytest", str(target), "-c", str(settings), "--benchmark-only"]
    command += [f"--device={config.device}", f"--threads={config.threads}", f"--seconds={config.seconds}"]
    command += ["--smoke"] if config.smoke else []
    command += [f"--impl={impl}" for impl in config.impl]
    command += [f"--benchmark-json={Path(config.json).resolve()}"] if config.json else []
    return subprocess.run(command, check=False).returncode


# The recipe of MoCoV2 pretraining: 800 epochs, batch 2048, lr 0.24; the queue starts from random rows.
_PRETRAIN = {
    "method.mix": "none",
    "method.queue_prefill": False,
    "data.batch_size": 2048,
    "optim.lr": 0.24,
    "optim.epochs": 800,
}

COMMANDS = {
    "finetune": Command(
        TrainConfig,
        _finetune,
        "adapt a pretrained backbone to unlabelled images",
        "fastuft finetune --init moco_v2_800ep.pth.tar --target photos/ --source imagenet/train/ --out runs/photos",
        {},
    ),
    "pretrain": Command(
        TrainConfig,
        _train,
        "MoCoV2 pretraining, or training from scratch on the target",
        "torchrun --nproc-per-node 8 -m fastuft.cli pretrain --target imagenet/train/ --out runs/mocov2",
        _PRETRAIN,
    ),
    "eval": Command(
        EvalConfig,
        _evaluate,
        "retrieval, clustering, few-shot and forgetting; without labels, what can be known without them",
        "fastuft eval --checkpoint runs/photos --train pets/train --test pets/test --out runs/photos/eval",
        {},
    ),
    "report": Command(
        options.ReportOptions,
        _report,
        "runs side by side as one HTML page and a table",
        "fastuft report naive=runs/naive ours=runs/photos --out report.html",
        {},
        "runs",
    ),
    "export": Command(
        options.ExportOptions,
        _export,
        "write a backbone for torchvision, timm or this program",
        "fastuft export --checkpoint runs/photos --out backbone.pth --layout torchvision",
        {},
    ),
    "verify-data": Command(
        options.VerifyOptions,
        _verify,
        "check image files before a long run",
        "fastuft verify-data photos/ imagenet/train/ --decode true",
        {},
        "paths",
    ),
    "bench": Command(
        options.BenchOptions, _bench, "run the benchmarks of a source checkout", "fastuft bench loss", {}, "what"
    ),
    "demo": Command(
        options.DemoOptions, _demo, "the whole job on embedded data, in minutes on a CPU", "fastuft demo --seeds 5", {}
    ),
    "doctor": Command(
        options.DoctorOptions, _doctor, "what is there, what is missing, and the remedy", "fastuft doctor", {}
    ),
}


def build_parser(names: Sequence[str] = tuple(COMMANDS)) -> Any:
    """The parser with the named sub-commands; building all of them costs start-up time."""
    from jsonargparse import ArgumentParser

    import fastuft

    class Parser(ArgumentParser):
        """Raises instead of printing its whole usage: the message alone is shown."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UsageError(message) from ex

    parser = Parser(
        prog="fastuft",
        description="Unsupervised finetuning of pretrained image backbones.",
        version=fastuft.__version__,
    )
    subcommands = parser.add_subcommands()
    for name in names:
        command = COMMANDS[name]
        summary = command.summary[0].upper() + command.summary[1:]
        child = Parser(description=f"{summary}.", epilog=f"Example: {command.example}")
        child.add_argument("--config", action="config", help="YAML file of options; later options win")
        if command.positional is not None:
            _add_positional(child, command)
        child.add_class_arguments(command.config, skip={command.positional} if command.positional else set())
        child.set_defaults(command.defaults)
        subcommands.add_subcommand(name, child, help=command.summary)
    return parser


def _add_positional(parser: Any, command: Command) -> None:
    """Take one option of the dataclass by its place, with the help of its docstring."""
    option = next(field for field in fields(command.config) if field.name == command.positional)
    lines = (line.strip() for line in (command.config.__doc__ or "").splitlines())
    text = next((line.partition(": ")[2] for line in lines if line.startswith(f"{option.name}:")), "")
    if option.default is MISSING:
        parser.add_argument(option.name, nargs="+", help=text)
    else:
        parser.add_argument(option.name, nargs="?", default=option.default, help=text)


def _option_types(config: type, prefix: str = "") -> dict[str, Any]:
    """Type of every option by its full name; groups come before their members."""
    types: dict[str, Any] = {}
    for name, kind in get_type_hints(config).items():
        types[prefix + name] = kind
        if is_dataclass(kind):
            types |= _option_types(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return types


def _allowed(kind: Any) -> str:
    """What an option of this type takes, in words."""
    plain = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    if kind in plain:
        return plain[kind]
    if is_dataclass(kind):
        return f"a group of {', '.join(field.name for field in fields(kind))}"
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if get_origin(kind) is tuple:
        return f"[{', '.join(map(_allowed, parts))}]"
    if get_origin(kind) is list:
        return f"a list, each item {_allowed(parts[0])}"
    return " or ".join(map(_allowed, parts))


def _one_line(error: Exception, command: Command | None) -> str:
    """A parser's complaint as one line that names the key and what is allowed."""
    text = " ".join(str(error).split())
    if command is None:
        wrong = re.search(r"invalid choice: '([^']*)'", text)
        return f"unknown command {wrong[1]!r}; choose one of {', '.join(COMMANDS)}" if wrong else text
    types = _option_types(command.config)
    required = re.search(r"arguments are required: (.+)$", text) or re.search(r'Key "([\w.]+)" is required', text)
    if required:
        names = [name.strip().split(".", 1)[-1].lstrip("-") for name in required[1].split(",")]
        missing = "; ".join(f"{name} takes {_allowed(types.get(name, str))}" for name in names)
        return f"missing {', '.join(names)}: {missing}. Example: {command.example}"
    stray = re.search(r"[Uu]nrecognized arguments: (?!--)(\S+)", text)
    if stray:
        return f"unexpected argument {stray[1]!r}; options are given as --NAME VALUE. Example: {command.example}"
    unknown = re.search(r"[Uu]nrecognized arguments: --([\w.]+)", text) or re.search(
        r"(?:does not accept option|[Kk]ey) ['\"]?([\w.]+)['\"]?(?: is not|$)", text
    )
    if unknown:
        known = [name for name, kind in types.items() if not is_dataclass(kind)]
        close = difflib.get_close_matches(unknown[1], known, 3, 0.4)
        allowed = f"closest: {', '.join(close)}" if close else f"allowed: {', '.join(known)}"
        return f"unknown option {unknown[1]!r}; {allowed}"
    key = re.search(r'[Kk]ey "([\w.]+)"', text)
    value = re.search(r"(?:Got value|value|given): (.*)$", text)
    if key and value and key[1] in types:
        return f"{key[1]}={value[1]} is not allowed; it takes {_allowed(types[key[1]])}"
    if text.startswith(("Problems parsing config", "Unexpected config")):
        return f"config is no YAML mapping of options: {text}"
    return text


def _normalised(arguments: Sequence[str], command: Command | None) -> list[str]:
    """Arguments as the parser takes them.

    ``--max-steps`` is ``--max_steps``; a bare ``--runtime.compile`` is true; one item for a list, or several with commas
    between, need no brackets.
    """
    types = {} if command is None else _option_types(command.config)
    given = list(arguments)
    result: list[str] = []
    while given:
        argument = given.pop(0)
        if not argument.startswith("--"):
            result.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        kind = types.get(name)
        if kind is bool and not equals:
            positional = command is not None and command.positional is not None
            bare = not given or given[0].startswith("--") or (positional and given[0] not in ("true", "false"))
            equals, value = "=", "true" if bare else given.pop(0)
        elif get_origin(kind) is list:
            if not equals and given:
                equals, value = "=", given.pop(0)
            if equals and not value.startswith("["):
                items = value.split(",")
                value = json.dumps(items) if get_args(kind)[0] is str else f"[{','.join(items)}]"
        result.append(f"--{name}{equals}{value}")
    return result


def _without_parser(arguments: Sequence[str]) -> int:
    """What works without the extra packages: the doctor, which tells how to get them."""
    if arguments and arguments[0] == "doctor":
        return _doctor(options.DoctorOptions(json="--json" in arguments))
    print(
        "fastuft: error: the command line needs jsonargparse and the other packages of an extra: "
        "pip install 'fastuft[train-cu13]' (or -cu12, -cpu); `fastuft doctor` tells what is missing",
        file=sys.stderr,
    )
    return EXIT_BAD_INPUT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status. Errors that a user can cause are one line on stderr, status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    command = COMMANDS.get(named or "")
    try:
        from jsonargparse import Namespace

        parser = build_parser([named] if named is not None and command is not None else tuple(COMMANDS))
    except ModuleNotFoundError as error:
        if error.name != "jsonargparse":
            raise
        return _without_parser(arguments)
    if not arguments:
        parser.print_help(sys.stderr)
        return EXIT_BAD_INPUT
    label = "fastuft" if command is None else f"fastuft {named}"
    try:
        parsed = parser.parse_args(_normalised(arguments, command))
    except UsageError as error:
        print(f"{label}: error: {_one_line(error, command)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    assert command is not None  # without a command only help and version parse, and they exit
    try:
        for name, kind in get_type_hints(command.config).items():
            if is_dataclass(kind) and not isinstance(parsed[named][name], Namespace):
                raise ValueError(f"{name}={parsed[named][name]!r} is not allowed; it takes {_allowed(kind)}")
        config = parser.instantiate(parsed)[named]
        values = {field.name: config[field.name] for field in fields(command.config)}
        return command.run(command.config(**values))
    except ValueError as error:
        print(f"{label}: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
