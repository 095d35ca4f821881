"""The sub-commands: what each one runs, with which options and defaults. Each imports what it needs when it runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastuft.cli import options
from fastuft.config import AUTO, AUTO_OPTIONS, EmbedConfig, EvalConfig, ReproduceConfig, SearchConfig, TrainConfig
from fastuft.console import progress_bar, say, shown_parts, shown_progress
from fastuft.names import printable

EXIT_FAILED = 1


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Args:
        config: the dataclass of its options.
        run: takes an instance of it and returns the exit status.
        summary: one line of help.
        example: shown below the help.
        defaults: defaults that differ from those of the dataclass.
        positional: the option that is given without its name, several times if it is a list.
        first: the options that the short help of a command with many options shows.
        more_examples: further examples.
    """

    config: type
    run: Callable[[Any], int]
    summary: str
    example: str
    defaults: dict[str, Any]
    positional: str | None = None
    first: tuple[str, ...] = ()
    more_examples: tuple[str, ...] = ()


def _finetune(config: TrainConfig) -> int:
    if config.init is None:
        raise ValueError(
            "init is missing; name the checkpoint to adapt (--init moco_v2_800ep.pth.tar), or use `fastuft pretrain` "
            "to train from scratch"
        )
    return _train(config)


def _train(config: TrainConfig) -> int:
    from fastuft.trainer import EXIT_PREEMPTED, LostRankError, NonFiniteLossError, train, under_torchelastic

    try:
        result = train(config)
    except (NonFiniteLossError, LostRankError) as error:
        say(f"fastuft: {error}", error=True)
        return EXIT_FAILED
    if result.interrupted:
        where, remedy = f"at step {result.steps}", "continue with --resume auto"
        if not result.steps:
            where, remedy = "before anything was saved", "start it again"
        say(f"stopped by {result.interrupted} {where}; {remedy}", error=True)
        return 0 if under_torchelastic() else EXIT_PREEMPTED
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"{result.run_dir}: {result.steps} steps, {result.bad_files} bad files skipped")
    return 0


def _evaluate(config: EvalConfig) -> int:
    from fastuft.jobs import evaluate_checkpoint
    from fastuft.report import table

    with shown_parts() as show:
        done = evaluate_checkpoint(config, show)
    for line in done.taken:
        say(str(line))
    say(table([done.run]))
    for statement in done.evaluation.metrics["statements"]:
        say(statement)
    say(f"report: {done.report}")
    return 0


def _embed(config: EmbedConfig) -> int:
    from fastuft.jobs import embed_images

    with shown_progress("image") as show:
        embeddings = embed_images(config, progress=show)
    for name, reason in list(embeddings.bad_files.items())[:20]:
        say(f"{name}: {reason}", error=True)
    count, width = embeddings.features.shape
    left = f", {len(embeddings.bad_files)} bad files left out" if embeddings.bad_files else ""
    say(f"{config.out}: {count} images, {width} features each{left}")
    return 0


def _search(config: SearchConfig) -> int:
    from fastuft.jobs import search

    for found in search(config):
        say(printable(found.query))
        for path, similarity in zip(found.paths, found.similarities, strict=True):
            say(f"  {similarity:.4f}  {printable(path)}")
    return 0


def _export(config: options.ExportOptions) -> int:
    from fastuft.jobs import check_checkpoint
    from fastuft.model import export

    check_checkpoint("checkpoint", config.checkpoint)
    taken = export(
        config.checkpoint,
        config.out,
        layout=config.layout,
        arch=config.arch,
        stem=config.stem,
        num_classes=config.num_classes,
        key=config.init_key,
        channels=config.init_channels,
    )
    say(str(taken))
    say(f"wrote {config.out} in the layout of {config.layout}")
    return 0


def _verify(config: options.VerifyOptions) -> int:
    from fastuft.data import find_duplicates, list_images, verify_files, write_bad_list

    paths = list_images(config.paths, config.suffixes)
    with progress_bar(len(paths), unit="file") as bar:
        bad = verify_files(
            paths,
            decode=config.decode,
            workers=config.workers,
            max_megapixels=config.max_megapixels,
            progress=bar.update,
        )
    for entry in bad[:20]:
        say(str(entry))
    if config.duplicates:
        with progress_bar(len(paths), unit="image") as bar:
            found = find_duplicates(paths, progress=bar.update)
        say(found.line() or f"no two of {found.checked:,} images look alike")
    if bad:
        write_bad_list(config.bad_list, bad)
        say(f"{len(bad)} of {len(paths)} files are bad; the list is in {config.bad_list}")
        return 1
    say(f"all {len(paths)} files are good")
    return 0


def _report(config: options.ReportOptions) -> int:
    from fastuft.report import comparison_table, load_run, table, write_comparison, write_report

    if all(entry.endswith(".jsonl") for entry in config.runs):
        page = Path(config.out)
        cells = write_comparison(page.parent, config.runs, stem=page.stem, title=config.title)
        say(comparison_table(cells, config.format))
        say(f"report: {page.with_suffix('.html')}")
        return 0
    runs = [load_run(*_named_run(entry)) for entry in config.runs]
    say(table(runs, config.format))
    for damage in dict.fromkeys(damage for run in runs for damage in run.damaged):
        say(f"fastuft report: {damage}", error=True)
    write_report(config.out, runs, title=config.title)
    say(f"report: {config.out}")
    return 0


def _named_run(entry: str) -> tuple[str, str]:
    """(name, folder) of ``NAME=FOLDER``, or of a folder whose own name may contain an equals sign."""
    name, separator, folder = entry.partition("=")
    if separator and not Path(entry).exists():
        return name, folder
    return Path(entry).resolve().name, entry


def _doctor(config: options.DoctorOptions) -> int:
    from fastuft.cli.doctor import run_doctor

    return run_doctor(as_json=config.json)


def _completion(config: options.CompletionOptions) -> int:
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ValueError("completion needs shtab: pip install 'fastuft[completion]'") from error

    from fastuft.cli.parsing import build_parser

    print(shtab.complete(build_parser(), config.shell))
    return 0


def _demo(config: options.DemoOptions) -> int:
    from fastuft.demo import run_demo

    run_demo(
        config.out,
        seeds=config.seeds,
        first_seed=config.first_seed,
        pretrain_epochs=config.pretrain_epochs,
        finetune_epochs=config.finetune_epochs,
        shots=config.shots,
        trials=config.trials,
        num_glyphs=config.num_glyphs,
    )
    return 0


def _reproduce(config: ReproduceConfig) -> int:
    from fastuft.reproduce import reproduce

    return EXIT_FAILED if reproduce(config) else 0


def _bench_folder() -> Path:
    """The benchmarks of the checkout that this package belongs to, or else of the one in the current directory."""
    here = Path.cwd()
    for root in (Path(__file__).resolve().parents[2], here, *here.parents):
        # An installed package is among others, one of which may have a folder with that name.
        if (root / "bench" / "bench_loss.py").is_file() and (root / "pyproject.toml").is_file():
            return root / "bench"
    raise ValueError("bench needs a source checkout: clone the repository and run `fastuft bench` in its folder")


def _bench(config: options.BenchOptions) -> int:
    folder = _bench_folder()
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ValueError("bench needs pytest and pytest-benchmark: pip install 'fastuft[bench]'")
    known = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    if config.what != "all" and config.what not in known:
        raise ValueError(f"what={config.what!r} is not allowed; choose one of all, {', '.join(known)}")
    target = folder if config.what == "all" else folder / f"bench_{config.what}.py"
    settings = folder.parent / "pyproject.toml"
    command = [sys.executable, "-m", "pytest", str(target), "-c", str(settings), "--benchmark-only"]
    command += [f"--device={config.device}", f"--threads={config.threads}", f"--seconds={config.seconds}"]
    command += ["--smoke"] if config.smoke else []
    command += [] if config.slow or config.smoke else ["-m", "not slow"]
    command += [f"--impl={impl}" for impl in config.impl]
    command += [f"--benchmark-json={Path(config.json).resolve()}"] if config.json else []
    return subprocess.run(command, check=False).returncode


_FIRST_OF_TRAINING = (
    "init",
    "target",
    "source",
    "out",
    "resume",
    "recipe",
    "model.arch",
    "data.batch_size",
    "optim.epochs",
    "optim.lr",
    "method.queue_size",
    "method.mix",
    "runtime.device",
)

# Options that are not given depend on the network.
_BY_FAMILY = {"optim.preset": "auto"}
# When users finetune, the run chooses what depends on the data and the machine.
_FINETUNE = {**_BY_FAMILY, "recipe": "auto", **dict.fromkeys(AUTO_OPTIONS, AUTO)}

# MoCoV2's pretraining recipe: 800 epochs, batch size 2048, learning rate 0.24; the queue starts with random rows.
_PRETRAIN = {
    **_BY_FAMILY,
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
        "adapt a pretrained backbone to unlabeled images",
        "fastuft finetune --init moco_v2_800ep.pth.tar --target photos/ --source imagenet/train/ --out runs/photos",
        _FINETUNE,
        first=_FIRST_OF_TRAINING,
        more_examples=(
            "fastuft finetune --config runs/photos/config.yaml --resume auto",
            "torchrun --nproc-per-node 8 -m fastuft.cli finetune --init start.pth --target '[a/, b/]' --out runs/photos",
        ),
    ),
    "pretrain": Command(
        TrainConfig,
        _train,
        "pretrain with MoCoV2, or train from scratch on the target",
        "torchrun --nproc-per-node 8 -m fastuft.cli pretrain --target imagenet/train/ --out runs/mocov2",
        _PRETRAIN,
        first=_FIRST_OF_TRAINING[1:],
        more_examples=(
            "fastuft pretrain --target photos/ --model.arch resnet18 --data.batch_size 64 --out runs/scratch",
        ),
    ),
    "eval": Command(
        EvalConfig,
        _evaluate,
        "measure retrieval, clustering, few-shot accuracy and forgetting; without labels, what can be known",
        "fastuft eval --checkpoint runs/photos --train pets/train --test pets/test --out runs/photos/eval",
        {},
        first=("checkpoint", "before", "train", "test", "source", "out", "size", "fewshot.shots", "trials", "device"),
        more_examples=("fastuft eval --checkpoint runs/photos --before start.pth --train photos/  # without labels",),
    ),
    "embed": Command(
        EmbedConfig,
        _embed,
        "write features of images to a file (.npz, .parquet), with the network's own preprocessing",
        "fastuft embed photos/ --checkpoint runs/photos --out photos.npz",
        {},
        "images",
        first=("images", "checkpoint", "out", "size", "batch_size", "on_bad_file", "device"),
    ),
    "search": Command(
        SearchConfig,
        _search,
        "find the images nearest to a query in a file of embeddings",
        "fastuft search query.jpg --in photos.npz --top 20",
        {},
        "query",
    ),
    "reproduce": Command(
        ReproduceConfig,
        _reproduce,
        "rerun the paper's tables and set the figures beside the paper's",
        "fastuft reproduce --data datasets/ --weights.unsupervised_resnet50 moco_v2_800ep.pth.tar --tables 1,2,5,6",
        {},
        first=(
            "scale",
            "tables",
            "datasets",
            "data",
            "source",
            "out",
            "trials",
            "seeds",
            "processes",
            "dry_run",
            "rate",
        ),
        more_examples=("fastuft reproduce --scale tiny", "fastuft reproduce --dry_run --rate 2500"),
    ),
    "report": Command(
        options.ReportOptions,
        _report,
        "show runs side by side, on one HTML page and in a table",
        "fastuft report naive=runs/naive ours=runs/photos --out report.html",
        {},
        "runs",
    ),
    "export": Command(
        options.ExportOptions,
        _export,
        "write a backbone for torchvision, timm, transformers, ONNX, torch.export or this program",
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
        options.BenchOptions,
        _bench,
        "run the benchmarks of a source checkout",
        "fastuft bench loss",
        {},
        "what",
        more_examples=("fastuft bench --smoke", "fastuft bench loss --impl mymodule:my_loss --json figures.json"),
    ),
    "demo": Command(
        options.DemoOptions,
        _demo,
        "run the whole job on bundled data, in minutes on a CPU",
        "fastuft demo --seeds 5",
        {},
    ),
    "doctor": Command(
        options.DoctorOptions,
        _doctor,
        "list what this machine has, what is missing, and the remedy",
        "fastuft doctor",
        {},
    ),
    "completion": Command(
        options.CompletionOptions,
        _completion,
        "print a script that completes commands and options in bash, zsh or tcsh",
        "fastuft completion bash > ~/.local/share/bash-completion/completions/fastuft",
        {},
        "shell",
    ),
}
