"""The sub-commands: their options, defaults, help and examples, and the action that each one runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastuft.cli import actions, options
from fastuft.cli.benchmarks import run_benchmarks
from fastuft.config import (
    AUTO,
    AUTO_OPTIONS,
    NETWORK_OPTIONS,
    EmbedConfig,
    EvalConfig,
    ReproduceConfig,
    SearchConfig,
    TrainConfig,
)


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
_FINETUNE = {**_BY_FAMILY, "recipe": "auto", **dict.fromkeys((*NETWORK_OPTIONS, *AUTO_OPTIONS), AUTO)}

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
        actions.run_finetune,
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
        actions.run_train,
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
        actions.run_eval,
        "measure retrieval, clustering, few-shot accuracy and forgetting; without labels, what can be known",
        "fastuft eval --checkpoint runs/photos --train pets/train --test pets/test --out runs/photos/eval",
        {},
        first=(
            *("checkpoint", "before", "before_fewshot", "train", "test", "source", "out", "size", "fewshot.shots"),
            *("trials", "device"),
        ),
        more_examples=("fastuft eval --checkpoint runs/photos --before start.pth --train photos/  # without labels",),
    ),
    "embed": Command(
        EmbedConfig,
        actions.run_embed,
        "write features of images to a file (.npz, .parquet), with the network's own preprocessing",
        "fastuft embed photos/ --checkpoint runs/photos --out photos.npz",
        {},
        "images",
        first=("images", "checkpoint", "out", "size", "batch_size", "on_bad_file", "device"),
    ),
    "search": Command(
        SearchConfig,
        actions.run_search,
        "find the images nearest to a query in a file of embeddings",
        "fastuft search query.jpg --in photos.npz --top 20",
        {},
        "query",
    ),
    "reproduce": Command(
        ReproduceConfig,
        actions.run_reproduce,
        "rerun the paper's tables and compare the figures with the paper's",
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
        actions.run_report,
        "show runs side by side, on one HTML page and in a table",
        "fastuft report naive=runs/naive ours=runs/photos --out report.html",
        {},
        "runs",
    ),
    "export": Command(
        options.ExportOptions,
        actions.run_export,
        "write a backbone for torchvision, timm, transformers, ONNX, torch.export or this program",
        "fastuft export --checkpoint runs/photos --out backbone.pth --layout torchvision",
        {},
    ),
    "verify-data": Command(
        options.VerifyOptions,
        actions.run_verify_data,
        "check image files before a long run",
        "fastuft verify-data photos/ imagenet/train/ --decode true",
        {},
        "paths",
    ),
    "bench": Command(
        options.BenchOptions,
        run_benchmarks,
        "run the benchmarks of a source checkout",
        "fastuft bench loss",
        {},
        "what",
        more_examples=("fastuft bench --smoke", "fastuft bench loss --impl mymodule:my_loss --json figures.json"),
    ),
    "demo": Command(
        options.DemoOptions,
        actions.run_demo,
        "run the whole job on bundled data, in minutes on a CPU",
        "fastuft demo --seeds 5",
        {},
    ),
    "doctor": Command(
        options.DoctorOptions,
        actions.run_doctor,
        "list what this machine has, what is missing, and the remedy",
        "fastuft doctor",
        {},
    ),
    "completion": Command(
        options.CompletionOptions,
        actions.run_completion,
        "print a script that completes commands and options in bash, zsh or tcsh",
        "fastuft completion bash > ~/.local/share/bash-completion/completions/fastuft",
        {},
        "shell",
    ),
}
