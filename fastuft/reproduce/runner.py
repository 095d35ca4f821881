"""Reproduces the paper's tables: plans, trains missing backbones, evaluates, and compares the results with the paper's.

Finished parts are kept, so the same command continues after an interruption, and tasks of a job array work side by side.
"""

from __future__ import annotations

import time
from pathlib import Path

from fastuft.config import ReproduceConfig
from fastuft.console import say
from fastuft.reproduce.claims import claim
from fastuft.reproduce.executor import Executor
from fastuft.reproduce.folders import GridFolders
from fastuft.reproduce.plan import Plan, check_plan, make_plan, plan_table
from fastuft.reproduce.recipes import SCALES, Scale
from fastuft.reproduce.results import write_results


def reproduce(config: ReproduceConfig, scale: Scale | None = None) -> int:
    """Print the plan, or run this task's share of it and write the tables.

    Args:
        config: what to reproduce, and the output folder.
        scale: sizes; by default those named by ``config.scale``.

    Returns:
        The number of failed parts, whose reasons are printed.

    Raises:
        ValueError: the configuration cannot work; raised before anything runs.
    """
    scale = scale or SCALES[config.scale]
    folders = GridFolders(Path(config.out), config.weights)
    plan = make_plan(config)
    if config.dry_run:
        say(plan_table(plan, scale, folders, trials=config.trials, rate=config.rate).show("text"))
        if config.rate:
            say(f"Hours of the trainings at {config.rate:g} images per second; no rate was measured for evaluations.")
        return 0
    began = time.perf_counter()
    failed = run_plan(plan, config, scale, folders)
    if config.stage in ("all", "tables") and config.tasks == 1 and folders.comparison.exists():
        say(folders.comparison.read_text(encoding="utf-8"))
        say(f"page:   {folders.comparison.with_suffix('.html')}")
        say(f"figure: {folders.figure_1}")
    say(f"time:   {time.perf_counter() - began:.0f} s")
    return failed


def run_plan(plan: Plan, config: ReproduceConfig, scale: Scale, folders: GridFolders) -> int:
    """Run this task's share of the stage; returns the number of failed parts, whose reasons are printed."""
    check_plan(plan, config, scale, folders)
    work = Executor(plan, config, scale, folders)
    if config.stage != "tables":
        work.run()
    if config.stage in ("all", "tables") and config.tasks == 1:
        with claim(folders.out, "tables", wait=True):
            write_results(plan, config, scale, folders)
    for name, reason in work.failures.items():
        say(f"failed: {name}: {reason}", error=True)
    return len(work.failures)
