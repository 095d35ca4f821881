"""The evaluation of a checkpoint, from the options to the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastuft.config import EvalConfig
from fastuft.jobs.inputs import check_checkpoint
from fastuft.model import InitReport, open_backbone

if TYPE_CHECKING:  # embeddings need neither scikit-learn nor plots
    from fastuft.evaluate import Evaluation
    from fastuft.report import RunFiles


@dataclass(frozen=True)
class EvaluatedCheckpoint:
    """The result of :func:`evaluate_checkpoint`.

    Args:
        evaluation: figures, statements and what the report shows.
        taken: the report on the tensors of each checkpoint.
        run: the files of the evaluation and of its run, as the report reads them.
        report: the HTML page.
    """

    evaluation: Evaluation
    taken: tuple[InitReport, ...]
    run: RunFiles
    report: Path


def evaluate_checkpoint(
    config: EvalConfig, progress: Callable[[str, int, int], None] | None = None
) -> EvaluatedCheckpoint:
    """Load, evaluate, and write ``eval.json``, ``eval_arrays.npz`` and ``report.html`` into ``config.out``.

    Args:
        config: the evaluation.
        progress: called with (name of the part, units done, total units).

    Raises:
        ValueError: a checkpoint or folder cannot be used.
        OSError: a file could not be written; an older evaluation is unchanged.
    """
    from fastuft.evaluate import evaluate_backbone, write_evaluation
    from fastuft.report import load_run, write_report

    check_checkpoint("checkpoint", config.checkpoint)
    if config.before is not None:
        check_checkpoint("before", config.before)
    backbone, said = open_backbone(
        config.checkpoint, config.arch, config.stem, key=config.init_key, channels=config.init_channels
    )
    taken, before = [said], None
    if config.before is not None:
        before, said = open_backbone(config.before, backbone.arch, backbone.stem, key=config.before_key)
        taken.append(said)
    evaluation = evaluate_backbone(backbone, config, before, progress)
    write_evaluation(config.out, evaluation)
    trained = Path(config.checkpoint)
    # The report also shows the curves of the run.
    run = load_run(trained.name or "checkpoint", [config.out, trained] if trained.is_dir() else config.out)
    report = Path(config.out) / "report.html"
    write_report(report, [run])
    return EvaluatedCheckpoint(evaluation, tuple(taken), run, report)
