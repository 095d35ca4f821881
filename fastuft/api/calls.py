"""Finetuning, evaluation, embedding and export as functions."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastuft.api.process import unchanged_process
from fastuft.api.run import Run
from fastuft.cli import configured
from fastuft.config import EmbedConfig, EvalConfig, TrainConfig
from fastuft.console import shown_parts, shown_progress

if TYPE_CHECKING:  # each call imports what it needs, so that importing the names costs nothing
    from fastuft.evaluate import Evaluation
    from fastuft.model import Backbone, InitReport, Stem
    from fastuft.runfolder import Progress

Location = str | os.PathLike[str]


def finetune(
    *,
    target: Location | Sequence[Location],
    init: Location,
    source: Location | Sequence[Location] | None = None,
    out: Location,
    on_step: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[Progress, dict[str, Any]], None] | None = None,
    **options: Any,
) -> Run:
    """Adapt a pretrained backbone to unlabeled images, as ``fastuft finetune`` does.

    ``fastuft.finetune(target="photos/", init="start.pth", out="runs/photos", optim={"lr": 0.03, "epochs": 50})``

    It runs in any thread. In the main thread, Ctrl-C and SIGTERM save within a step and end the run, and ``interrupted`` then
    has the signal. Signal handlers, random numbers and torch's switches are restored afterwards.

    Args:
        target: unlabeled images: a folder, a list file, shards or a URL, or several of them.
        init: checkpoint, run folder or :class:`Run` to start from.
        source: source images for replaying; None trains only on the target.
        out: run folder.
        on_step: called after each step with the progress so far; to keep the run fast, it must not wait for the device.
        on_epoch: called after each epoch with the progress and the last row of metrics.
        options: options of the command line (``fastuft finetune --help all``), nested as in ``optim={"lr": 0.03}``, or by
            their dotted names as in ``**{"optim.lr": 0.03}``; ``config`` names a YAML file of options.

    Raises:
        ValueError: an option, folder, checkpoint or file cannot work; the message is that of the command line.
        fastuft.trainer.NonFiniteLossError: the loss became NaN or infinite.
        fastuft.trainer.CheckpointError: a checkpoint could not be read or written.
    """
    from fastuft.trainer import Callbacks, train

    config: TrainConfig = configured(
        "finetune", {"target": target, "init": init, "source": source, "out": out, **options}
    )
    with unchanged_process():
        result = train(config, Callbacks(on_step, on_epoch))
    return Run(
        result.run_dir, result.steps, result.finished, result.interrupted, result.metrics, bad_files=result.bad_files
    )


def evaluate(
    *, checkpoint: Location, train: Location, test: Location | None = None, out: Location, **options: Any
) -> Evaluation:
    """Evaluate a checkpoint on folders of images, as ``fastuft eval`` does; the report is ``out/report.html``.

    ``fastuft.evaluate(checkpoint="runs/photos", train="pets/train", test="pets/test", out="runs/photos/eval").metrics``

    Args:
        checkpoint: run folder, :class:`Run`, or any checkpoint that finetuning starts from.
        train: training images; with class folders, the labeled metrics are computed.
        test: test images with the same classes.
        out: folder for eval.json and report.html.
        options: as in :func:`finetune`; see ``fastuft eval --help all``.

    Raises:
        ValueError: an option, folder or checkpoint cannot work.
        OSError: a file could not be written; an older evaluation is unchanged.
    """
    from fastuft.jobs import evaluate_checkpoint

    given = {"checkpoint": checkpoint, "train": train, "test": test, "out": out, **options}
    config: EvalConfig = configured("eval", given)
    with unchanged_process(), shown_parts() as show:
        return evaluate_checkpoint(config, show).evaluation


def embed(
    images: Location | Sequence[Location],
    checkpoint: Location | Backbone,
    *,
    out: Location | None = None,
    **options: Any,
) -> tuple[Tensor, list[str]]:
    """Features of images, with the network's own preprocessing, as ``fastuft embed`` computes them.

    ``features, paths = fastuft.embed("photos/", "runs/photos")``

    Args:
        images: a folder of any depth, a list file, an image, or several of them.
        checkpoint: run folder, :class:`Run`, any checkpoint that finetuning starts from, or a loaded backbone.
        out: .npz or .parquet file to write as well; with it, an interrupted call continues where it stopped.
        options: as in :func:`finetune`; see ``fastuft embed --help``.

    Returns:
        features [N, D] float32 on the CPU, not normalized, and the N absolute paths, sorted within each folder.

    Raises:
        ValueError: an option, folder, checkpoint or file cannot work.
    """
    from fastuft.jobs import embed_images

    backbone = checkpoint if isinstance(checkpoint, nn.Module) else None
    if backbone is not None and out is not None:
        raise ValueError(
            "out needs a checkpoint that a search can find again; pass its path instead of a loaded backbone"
        )
    several = [images] if isinstance(images, str | os.PathLike) else list(images)
    given = {"images": several, "checkpoint": backbone.arch if backbone else checkpoint, **options}
    config: EmbedConfig = configured("embed", given if out is None else {**given, "out": out})
    with shown_progress("image") as show:
        embeddings = embed_images(config, backbone, keep=out is not None, progress=show)
    return torch.from_numpy(embeddings.features), list(embeddings.paths)


def load_backbone(
    checkpoint: Location, arch: str | None = None, stem: Stem | None = None, *, key: str | None = None
) -> Backbone:
    """The backbone of a checkpoint, in eval mode: [B, 3, H, W], normalized by its ``mean`` and ``std`` -> [B, num_features].

    Args:
        checkpoint: run folder, :class:`Run`, or any checkpoint that finetuning starts from.
        arch: the network, if the checkpoint does not name it.
        stem: the stem, if the checkpoint does not name it.
        key: prefix of one of several backbones in the file (encoder_k, teacher).

    Raises:
        ValueError: the checkpoint does not exist, is damaged, or has another network.
    """
    from fastuft import model
    from fastuft.jobs import check_checkpoint

    check_checkpoint("checkpoint", os.fspath(checkpoint))
    return model.load_backbone(os.fspath(checkpoint), arch, stem, key=key)


def export(checkpoint: Location, out: Location, **options: Any) -> InitReport:
    """Write a checkpoint's backbone for other libraries, as ``fastuft export`` does.

    ``fastuft.export("runs/photos", "backbone.pth", layout="torchvision")``

    Args:
        checkpoint: run folder, :class:`Run`, or any checkpoint that finetuning starts from.
        out: file to write.
        options: as in :func:`finetune`; see ``fastuft export --help``.

    Returns:
        The report on the checkpoint's tensors.

    Raises:
        ValueError: an option or checkpoint cannot work.
        OSError: a file could not be written.
    """
    from fastuft import model
    from fastuft.jobs import check_checkpoint

    config = configured("export", {"checkpoint": checkpoint, "out": out, **options})
    check_checkpoint("checkpoint", config.checkpoint)
    chosen = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    names = {"init_key": "key", "init_channels": "channels"}
    return model.export(**{names.get(name, name): value for name, value in chosen.items()})
