"""The whole evaluation of one backbone on folders of images, and the files that it writes for the report."""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastuft.atomic import remove_leftovers, whole_file
from fastuft.config import EvalConfig
from fastuft.device import choose_device
from fastuft.evaluate.features import at_work, weights_hash
from fastuft.evaluate.folders import read_folders
from fastuft.evaluate.sections import AFTER, BEFORE, Context, Progress, run_sections
from fastuft.model import Backbone
from fastuft.names import printable
from fastuft.runfolder import RunFolder


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate_backbone`.

    Args:
        metrics: JSON-able values, accuracies as fractions; written as ``eval.json``.
        arrays: what the report shows (map, gallery, thumbnails); written as ``eval_arrays.npz``.
        draws: files of each few-shot draw, by trial and class; written as ``fewshot_draws.json``.
    """

    metrics: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    draws: dict[str, dict[str, list[str]]] = field(default_factory=dict)


def evaluate_backbone(
    backbone: Backbone, config: EvalConfig, before: Backbone | None = None, progress: Progress | None = None
) -> Evaluation:
    """Every metric that the given folders allow, for one backbone.

    With class folders in ``config.train`` and ``config.test``: retrieval, clustering, few-shot. With class folders in
    ``config.source``: forgetting. Without labels: alignment, uniformity, drift and neighbors, and statements about what
    cannot be known. A metric without a value (collapsed features, a diverged finetuning, too few images) also becomes a
    statement and does not affect the others; ``not_known`` gives the reason.

    Args:
        backbone: the network; it is not changed.
        config: folders and settings; ``checkpoint``, ``before`` and ``out`` are recorded, not used.
        before: the backbone to compare with, usually the initialization.
        progress: called with (name of the part, units done, total units).

    Raises:
        ValueError: test images of a class without training images, unreadable images, or features that are not finite.
    """
    folders = read_folders(config)
    for doubt in folders.doubts:
        warnings.warn(doubt, stacklevel=2)
    backbones = {AFTER: backbone} if before is None else {AFTER: backbone, BEFORE: before}
    device = choose_device(config.device)
    size = config.size or _usual_size(config.checkpoint, backbone)
    for network in backbones.values():
        network.check_size(size, "size")
    context = Context(config, folders, backbones, size, progress)
    with at_work(list(backbones.values()), device):
        context.extract()
        part = run_sections(context)
    metrics = {
        "labeled": folders.judged,
        "classes": [printable(name) for name in folders.train.classes],
        "counts": {name: len(images.paths) for name, images in folders.named().items()},
        "bad_files": folders.bad_files,
        **part.metrics,
        "statements": [*folders.doubts, *part.statements],
        "not_known": part.not_known,
        "timings": {name: round(seconds, 3) for name, seconds in context.timings.items()},
        "backbone": {
            "num_features": int(context.features(AFTER, "train").shape[1]),
            "parameters": sum(p.numel() for p in backbone.parameters()),
            "hash": weights_hash(backbone),
        },
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "config": dataclasses.asdict(dataclasses.replace(config, size=size)),
    }
    return Evaluation(metrics, part.arrays, part.draws)


def _usual_size(checkpoint: str, backbone: Backbone) -> int:
    """Side of the training crop if ``checkpoint`` is a run folder, else the network's own input size."""
    trained = RunFolder(Path(checkpoint)).read_config().get("augment")
    size = trained.get("size") if isinstance(trained, dict) else None
    return size if isinstance(size, int) and size >= 8 else backbone.input_size


def write_evaluation(folder: Path | str, result: Evaluation) -> None:
    """Write ``eval_arrays.npz`` (without pickle), ``fewshot_draws.json`` after few-shot runs, and ``eval.json``.

    All of them are whole on the disk before the first gets its name, and ``eval.json`` is renamed last: an evaluation
    that has it is finished, and an earlier evaluation stays unchanged until then.

    Raises:
        OSError: a file could not be written; the error names it, and an earlier evaluation is unchanged.
    """
    run = RunFolder(Path(folder))
    draws = run.path / "fewshot_draws.json"
    contents = {run.evaluation_file: _json(result.metrics)}
    if result.draws:
        contents[draws] = _json(result.draws)
    arrays = io.BytesIO()
    np.savez_compressed(arrays, **result.arrays)  # type: ignore[arg-type]
    contents[run.arrays_file] = arrays.getvalue()
    with _naming(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run.path)
        with ExitStack() as renames:  # they happen in reverse order
            for file, content in contents.items():
                with _naming(file):
                    renames.enter_context(whole_file(file)).write_bytes(content)
        if not result.draws:
            draws.unlink(missing_ok=True)  # from an earlier evaluation


def _json(value: Mapping[str, object]) -> bytes:
    """JSON in ASCII, with names escaped: file names need not be UTF-8."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode("ascii")


class _NotWrittenError(OSError):
    """Names the file that could not be written."""


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make an OSError name ``path``, unless it already names a file, and say that nothing was changed."""
    try:
        yield
    except _NotWrittenError:
        raise
    except OSError as error:
        reason = f"{error.strerror}; it could not be written, and earlier files are unchanged"
        raise _NotWrittenError(error.errno, reason, str(path)) from error
