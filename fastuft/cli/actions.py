"""What each sub-command does with its options: it calls a room, prints the outcome, and returns the exit status.

Each function imports what it needs when it runs, so that ``--help`` loads neither torch nor the rooms.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastuft.cli import options
from fastuft.config import EmbedConfig, EvalConfig, ReproduceConfig, SearchConfig, TrainConfig
from fastuft.console import progress_bar, say, shown_parts, shown_progress
from fastuft.names import printable

EXIT_FAILED = 1


def run_finetune(config: TrainConfig) -> int:
    if config.init is None:
        raise ValueError(
            "init is missing; name the checkpoint to adapt (--init moco_v2_800ep.pth.tar), or use `fastuft pretrain` "
            "to train from scratch"
        )
    return run_train(config)


def run_train(config: TrainConfig) -> int:
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


def run_eval(config: EvalConfig) -> int:
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


def run_embed(config: EmbedConfig) -> int:
    from fastuft.jobs import embed_images

    with shown_progress("image") as show:
        embeddings = embed_images(config, progress=show)
    for name, reason in list(embeddings.bad_files.items())[:20]:
        say(f"{name}: {reason}", error=True)
    count, width = embeddings.features.shape
    left = f", {len(embeddings.bad_files)} bad files left out" if embeddings.bad_files else ""
    say(f"{config.out}: {count} images, {width} features each{left}")
    return 0


def run_search(config: SearchConfig) -> int:
    from fastuft.jobs import search

    for found in search(config):
        say(printable(found.query))
        for path, similarity in zip(found.paths, found.similarities, strict=True):
            say(f"  {similarity:.4f}  {printable(path)}")
    return 0


def run_export(config: options.ExportOptions) -> int:
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


def run_verify_data(config: options.VerifyOptions) -> int:
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


def run_report(config: options.ReportOptions) -> int:
    from fastuft.report import comparison_table, load_run, table, write_comparison, write_report

    if all(entry.endswith(".jsonl") for entry in config.runs):
        page = Path(config.out)
        cells = write_comparison(page.parent, config.runs, stem=page.stem, title=config.title)
        say(comparison_table(cells, config.format))
        say(f"report: {page.with_suffix('.html')}")
        return 0
    runs = [load_run(*_named(entry)) for entry in config.runs]
    say(table(runs, config.format))
    for damage in dict.fromkeys(damage for run in runs for damage in run.damaged):
        say(f"fastuft report: {damage}", error=True)
    write_report(config.out, runs, title=config.title)
    say(f"report: {config.out}")
    return 0


def _named(entry: str) -> tuple[str, str]:
    """(name, folder) of ``NAME=FOLDER``, or of a folder whose own name may contain an equals sign."""
    name, separator, folder = entry.partition("=")
    if separator and not Path(entry).exists():
        return name, folder
    return Path(entry).resolve().name, entry


def run_doctor(config: options.DoctorOptions) -> int:
    from fastuft.cli.doctor import print_findings

    return print_findings(as_json=config.json)


def run_completion(config: options.CompletionOptions) -> int:
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ValueError("completion needs shtab: pip install 'fastuft[completion]'") from error

    from fastuft.cli.parsing import build_parser

    print(shtab.complete(build_parser(), config.shell))
    return 0


def run_demo(config: options.DemoOptions) -> int:
    from fastuft import demo

    demo.run_demo(
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


def run_reproduce(config: ReproduceConfig) -> int:
    from fastuft.reproduce import reproduce

    return EXIT_FAILED if reproduce(config) else 0
