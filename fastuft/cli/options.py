"""Options of the sub-commands other than training, evaluation, embedding and reproduction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastuft.config import AtLeast0, AtLeast1, DataConfig, Positive, Range, check_values


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint's backbone for other libraries.

    Args:
        checkpoint: run folder, exported backbone, or any checkpoint that finetuning starts from.
        out: file to write (.safetensors or .pth; .onnx; .pt2 for torch_export), or folder for transformers.
        layout: fastuft (with metadata), torchvision, timm, transformers (a folder for from_pretrained), onnx or torch_export.
        arch: the network, if the checkpoint does not name it.
        stem: the stem, if the checkpoint does not name it.
        init_key: prefix of one of several backbones in the checkpoint (encoder_k, teacher); none takes the one that was
            trained by gradients.
        init_channels: channels of its first convolution; auto is RGB or what the layout says, bgr and gray are converted.
        num_classes: add a classifier of zeros with this many classes, so that the full network loads strictly.
    """

    checkpoint: str
    out: str
    layout: Literal["fastuft", "torchvision", "timm", "transformers", "onnx", "torch_export"] = "fastuft"
    arch: str | None = None
    stem: Literal["imagenet", "small"] | None = None
    init_key: str | None = None
    init_channels: Literal["auto", "rgb", "bgr", "gray"] = "auto"
    num_classes: AtLeast0 = 0

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class VerifyOptions:
    """Check image files before a long run.

    Args:
        paths: folders, list files or images.
        decode: also decode every image (slower; finds damaged pixels).
        duplicates: also count images that look like another one: copies, other sizes, frames of a burst.
        bad_list: file to write bad files and reasons to.
        workers: threads; 0 takes one per processor, at least 16.
        max_megapixels: larger images count as bad.
        suffixes: suffixes of image files in folders, as in the run's data.suffixes.
    """

    paths: list[str]
    decode: bool = False
    duplicates: bool = True
    bad_list: str = "bad_files.txt"
    workers: AtLeast0 = 0
    max_megapixels: Positive = 180.0
    suffixes: tuple[str, ...] = DataConfig.suffixes

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty; name at least one folder, list file or image")
        check_values(self)


@dataclass(frozen=True)
class ReportOptions:
    """Show runs side by side on one page, or reproduced figures with the paper's.

    Args:
        runs: run or evaluation folders, as FOLDER or NAME=FOLDER, of which equal names are seeds of one arm; or the
            results.jsonl files of reproductions.
        out: HTML file to write.
        title: title of the page.
        format: format of the printed table.
    """

    runs: list[str]
    out: str = "report.html"
    title: str = "Unsupervised finetuning"
    format: Literal["text", "markdown", "csv"] = "text"

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs is empty; name at least one run folder")


@dataclass(frozen=True)
class DoctorOptions:
    """List what this machine has, what is missing, and the remedy.

    Args:
        json: print JSON instead of a table.
    """

    json: bool = False


@dataclass(frozen=True)
class CompletionOptions:
    """Print a script that completes commands and options in a shell.

    Args:
        shell: bash, zsh or tcsh.
    """

    shell: Literal["bash", "zsh", "tcsh"] = "bash"

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class BenchOptions:
    """Run the benchmarks of a source checkout on this machine.

    Args:
        what: all, or the name of one benchmark file: loss, loss_sweep, mix, streams, sources, step, momentum,
            enqueue, evaluate.
        smoke: smallest sizes, once each.
        slow: also the rows that take minutes on a CPU: larger networks, mixing, half precision, compiled steps.
        impl: other implementations of the loss to put into the table, each as MODULE:FUNCTION.
        json: file for pytest-benchmark's figures.
        device: auto (cuda if present), cuda or cpu.
        threads: PyTorch's CPU threads.
        seconds: time for the rounds of each benchmark.
    """

    what: str = "all"
    smoke: bool = False
    slow: bool = False
    impl: list[str] = field(default_factory=list)
    json: str | None = None
    device: Literal["auto", "cuda", "cpu"] = "auto"
    threads: AtLeast1 = 1
    seconds: Positive = 1.0

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class DemoOptions:
    """Run the whole job on data that is bundled with the installed libraries.

    Args:
        out: folder for images, runs and the report.
        seeds: repetitions, for mean and spread.
        first_seed: seed of the first repetition.
        pretrain_epochs: epochs on the glyphs.
        finetune_epochs: epochs of each arm over its training images.
        shots: labeled images per class of the few-shot runs.
        trials: draws per few-shot figure.
        num_glyphs: images in the source.
    """

    out: str = "runs/demo"
    seeds: AtLeast1 = 1
    first_seed: int = 0
    pretrain_epochs: AtLeast1 = 20
    finetune_epochs: AtLeast1 = 40
    shots: list[Literal[1, 2, 4, 8, 16]] = field(default_factory=lambda: [1, 2, 4, 8])
    trials: AtLeast1 = 1
    num_glyphs: Annotated[int, Range(128)] = 8000

    def __post_init__(self) -> None:
        check_values(self)
