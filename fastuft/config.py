"""The configuration tree of fastuft: frozen dataclasses, standard library only.

One tree describes a run completely: the command line builds it, the run folder keeps it as
``config.yaml``, and loading that file gives the same run again. Field docstrings are shown by ``--help``.
Checks of one field's value, and of combinations of fields, live in ``__post_init__`` so that an impossible
configuration is refused before any work starts. Numbers default to the paper's recipe for unsupervised
finetuning (lr 0.015, batch 256, 200 epochs, K = 65536, tau = 0.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Mix = Literal["none", "cutmix", "mixup"]
BatchNormMode = Literal["auto", "plain", "split", "shuffle", "sync"]
Paths = str | list[str]


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed; choose one of {', '.join(map(repr, allowed))}")


def check_range(
    name: str,
    value: float,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    remedy: str = "",
) -> None:
    """Raise ValueError unless ``low <= value <= high`` (``low < value`` with ``low_open``)."""
    if not (value > low if low_open else value >= low) or not value <= high:
        interval = f"{'(' if low_open else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name}={value!r} is out of range; allowed: {interval}{'; ' + remedy if remedy else ''}")


def check_paths(name: str, value: Paths | None) -> None:
    """Raise ValueError when a path is empty: it would mean the working directory."""
    if any(not path.strip() for path in as_paths(value)):
        raise ValueError(f"{name}={value!r} holds an empty path; name a folder or file, '.' for the working directory")


def as_paths(value: Paths | None) -> tuple[str, ...]:
    """A path, a list of paths or nothing, as a tuple of paths."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, projection head and key encoder.

    Args:
        arch: resnet18 | resnet34 | resnet50 | resnet101, resnet_tiny (the demo's three-block network),
            bit_resnet50 | bit_resnet101 (ResNet-v2 with GroupNorm and weight standardization), or timm:NAME.
        stem: imagenet (7x7, stride 2, max-pool) or small (3x3, no max-pool; stride 1, resnet_tiny's 2); never inferred.
        head_dim: width D of the embedding.
        bn: batch statistics of the encoders; auto is split on one device and shuffle on several.
            Networks without BatchNorm ignore it.
        bn_group: images in one statistics group of ``split``; must divide the batch of one device.
    """

    arch: str = "resnet50"
    stem: Literal["imagenet", "small"] = "imagenet"
    head_dim: int = 128
    bn: BatchNormMode = "auto"
    bn_group: int = 32

    def __post_init__(self) -> None:
        check_choice("model.stem", self.stem, ("imagenet", "small"))
        check_choice("model.bn", self.bn, ("auto", "plain", "split", "shuffle", "sync"))
        check_range("model.head_dim", self.head_dim, 1)
        check_range("model.bn_group", self.bn_group, 2)


@dataclass(frozen=True)
class MethodConfig:
    """MoCoV2 and the paper's two additions (Li et al. 2021, Eq. 4-6).

    Args:
        temperature: tau.
        queue_size: K, negatives kept.
        key_momentum: m of the key encoder's moving average.
        queue_prefill: fill the queue with keys of training images before epoch 0 (finetuning) or start
            from random unit rows (pretraining).
        mix: how the mixed query of Eq. 5 is made.
        mix_weight: w in L = L_q + w L_m.
        mix_only: train on L_m alone (about 2/3 of the cost).
        alpha: lambda ~ Beta(alpha, alpha).
        mix_per: one lambda and box for the whole batch, or one a pair.
    """

    temperature: float = 0.2
    queue_size: int = 65536
    key_momentum: float = 0.999
    queue_prefill: bool = True
    mix: Mix = "cutmix"
    mix_weight: float = 1.0
    mix_only: bool = False
    alpha: float = 1.0
    mix_per: Literal["batch", "pair"] = "batch"

    def __post_init__(self) -> None:
        check_range("method.temperature", self.temperature, 0.0, low_open=True)
        check_range("method.queue_size", self.queue_size, 1)
        check_range("method.key_momentum", self.key_momentum, 0.0, 1.0)
        check_choice("method.mix", self.mix, ("none", "cutmix", "mixup"))
        check_choice("method.mix_per", self.mix_per, ("batch", "pair"))
        check_range("method.mix_weight", self.mix_weight, 0.0)
        check_range("method.alpha", self.alpha, 0.0, low_open=True)
        if self.mix_only and self.mix == "none":
            raise ValueError("method.mix_only=True needs a mixed query; set method.mix to cutmix or mixup")


@dataclass(frozen=True)
class AugmentConfig:
    """The random views of one training image (MoCoV2's list; ``fastuft.data.SMALL_IMAGES`` suits 32 px).

    Args:
        size: side of the square crop, pixels.
        crop_scale: area range of the random resized crop.
        crop_ratio: aspect range of the random resized crop.
        brightness: jitter strength.
        contrast: jitter strength.
        saturation: jitter strength.
        hue: jitter strength.
        jitter_p: probability of the color jitter.
        grayscale_p: probability of dropping the color.
        blur_sigma: range of the Gaussian blur's sigma, pixels.
        blur_p: probability of the blur.
        flip_p: probability of the horizontal flip.
        rotation: rotation drawn from +-rotation degrees; 0 leaves the operator out.
    """

    size: int = 224
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter_p: float = 0.8
    grayscale_p: float = 0.2
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_p: float = 0.5
    flip_p: float = 0.5
    rotation: float = 0.0

    def __post_init__(self) -> None:
        check_range("augment.size", self.size, 8)
        for name in ("jitter_p", "grayscale_p", "blur_p", "flip_p"):
            check_range(f"augment.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("brightness", "contrast", "saturation"):
            check_range(f"augment.{name}", getattr(self, name), 0.0, 1.0)
        check_range("augment.hue", self.hue, 0.0, 0.5)
        check_range("augment.rotation", self.rotation, 0.0, 180.0)
        for name, top in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            low, high = getattr(self, name)
            check_range(f"augment.{name}[0]", low, 0.0, high, low_open=True)
            check_range(f"augment.{name}[1]", high, low, top)


@dataclass(frozen=True)
class DataConfig:
    """Streams of training images.

    Args:
        batch_size: global batch, images a step over all ranks.
        replay_fraction: share of the source set that joins training (sparse source data replaying).
        replay_seed: seed of the one fixed draw of that share.
        replay_mode: union (one shuffled pass over target and replay) or balanced (fixed source share a batch).
        replay_share: source share of each batch when ``replay_mode`` is balanced.
        replay_cache: folder to copy the drawn source images to once (fast local disk).
        loader: dali, torch, or auto (DALI when installed, otherwise the PyTorch loader, said in one line).
        threads: decoding threads; 0 derives it from the machine.
        prefetch: batches prepared ahead.
        hw_decoder_load: share of JPEGs given to the GPU's hardware decoder.
        on_bad_file: error names the file and stops; skip replaces it by a good one and counts it.
        drop_last: leave out the last partial batch of an epoch (needed with ``split`` statistics).
        max_megapixels: largest image in megapixels that is decoded at all.
    """

    batch_size: int = 256
    replay_fraction: float = 0.1
    replay_seed: int = 0
    replay_mode: Literal["union", "balanced"] = "union"
    replay_share: float = 0.5
    replay_cache: str | None = None
    loader: Literal["auto", "dali", "torch"] = "auto"
    threads: int = 0
    prefetch: int = 2
    hw_decoder_load: float = 0.9
    on_bad_file: Literal["error", "skip"] = "error"
    drop_last: bool = True
    max_megapixels: float = 180.0

    def __post_init__(self) -> None:
        check_range("data.batch_size", self.batch_size, 2)
        check_range("data.replay_fraction", self.replay_fraction, 0.0, 1.0)
        check_choice("data.replay_mode", self.replay_mode, ("union", "balanced"))
        check_range("data.replay_share", self.replay_share, 0.0, 1.0)
        check_choice("data.loader", self.loader, ("auto", "dali", "torch"))
        check_range("data.threads", self.threads, 0)
        check_range("data.prefetch", self.prefetch, 1)
        check_range("data.hw_decoder_load", self.hw_decoder_load, 0.0, 1.0)
        check_choice("data.on_bad_file", self.on_bad_file, ("error", "skip"))
        check_range("data.max_megapixels", self.max_megapixels, 0.0, low_open=True)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule.

    Args:
        lr: learning rate at the configured batch; see ``scale_lr``.
        scale_lr: multiply ``lr`` by batch_size / 256 (linear scaling, off by default).
        momentum: SGD momentum.
        weight_decay: SGD weight decay.
        epochs: passes over the union.
        schedule: cosine to zero over all steps, or constant.
        warmup_epochs: linear warm-up from zero.
        clip_grad: largest gradient norm; 0 is off.
        optimizer: sgd, or apex_fused_sgd (needs NVIDIA's apex).
    """

    lr: float = 0.015
    scale_lr: bool = False
    momentum: float = 0.9
    weight_decay: float = 1e-4
    epochs: int = 200
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    clip_grad: float = 0.0
    optimizer: Literal["sgd", "apex_fused_sgd"] = "sgd"

    def __post_init__(self) -> None:
        check_range("optim.lr", self.lr, 0.0, low_open=True)
        check_range("optim.momentum", self.momentum, 0.0, 1.0)
        check_range("optim.weight_decay", self.weight_decay, 0.0)
        check_range("optim.epochs", self.epochs, 1)
        check_choice("optim.schedule", self.schedule, ("cosine", "constant"))
        check_range("optim.warmup_epochs", self.warmup_epochs, 0.0, self.epochs, remedy="it is a part of optim.epochs")
        check_range("optim.clip_grad", self.clip_grad, 0.0)
        check_choice("optim.optimizer", self.optimizer, ("sgd", "apex_fused_sgd"))


@dataclass(frozen=True)
class RuntimeConfig:
    """How the run uses the machine.

    Args:
        device: auto (cuda when present), cuda or cpu.
        precision: auto is bf16 on a GPU and fp32 on a CPU; fp16 uses a GradScaler.
        compile: torch.compile the encoders.
        deterministic: bit-exact reruns on a GPU, at some cost; a CPU run always is.
        log_every: steps between metric rows.
        save_every: steps between checkpoints; 0 saves once an epoch.
        keep_last: newest checkpoints kept.
        keep_every: also keep each checkpoint whose step is a multiple of this; 0 keeps none.
        tensorboard: write TensorBoard events beside metrics.jsonl.
        wandb: log to Weights & Biases when it is installed.
        timeout: seconds after which processes that wait for a lost one give up.
    """

    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: bool = False
    deterministic: bool = False
    log_every: int = 10
    save_every: int = 0
    keep_last: int = 2
    keep_every: int = 0
    tensorboard: bool = True
    wandb: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        check_choice("runtime.device", self.device, ("auto", "cuda", "cpu"))
        check_choice("runtime.precision", self.precision, ("auto", "bf16", "fp16", "fp32"))
        check_range("runtime.log_every", self.log_every, 1)
        check_range("runtime.save_every", self.save_every, 0)
        check_range("runtime.keep_last", self.keep_last, 1)
        check_range("runtime.keep_every", self.keep_every, 0)
        check_range("runtime.timeout", self.timeout, 0.0, low_open=True)


@dataclass(frozen=True)
class WatchConfig:
    """Optional evaluation while training.

    Args:
        train: labeled folder used as retrieval gallery.
        test: labeled folder whose images query the gallery.
        source: source folder whose clustering is watched (forgetting).
        every_epochs: epochs between evaluations; 0 is off.
    """

    train: str | None = None
    test: str | None = None
    source: str | None = None
    every_epochs: int = 0

    def __post_init__(self) -> None:
        check_range("watch.every_epochs", self.every_epochs, 0)
        if self.every_epochs and not (self.source or (self.train and self.test)):
            raise ValueError(
                f"watch.every_epochs={self.every_epochs} needs something to watch; "
                "set watch.train and watch.test, or watch.source"
            )


@dataclass(frozen=True)
class TrainConfig:
    """One training run: finetuning (with ``init``) or pretraining (without).

    Args:
        target: unlabeled images: a folder, a list file (.txt), or several of them as '[a, b]'.
        out: run folder.
        init: checkpoint to start from (MoCo, torchvision, timm, lightly or fastuft layout); none starts at random.
        allow_missing: patterns of backbone tensors that ``init`` may lack.
        source: source images for replaying: a folder, a list file, or several as '[a, b]'; none trains on the target
            alone.
        seed: seed of initialization, order and augmentation.
        resume: no starts afresh and refuses a folder that holds a run; auto goes on from the newest good
            checkpoint in ``out`` or starts afresh; a path names the checkpoint.
        max_steps: stop after this many steps (the schedule still spans all epochs).
        model: the network.
        method: the loss and its additions.
        augment: the views.
        data: the streams.
        optim: the optimizer.
        runtime: the machine.
        watch: evaluation while training.
    """

    target: Paths
    out: str
    init: str | None = None
    allow_missing: list[str] = field(default_factory=list)
    source: Paths | None = None
    seed: int = 0
    resume: str = "no"
    max_steps: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        if self.max_steps is not None:
            check_range("max_steps", self.max_steps, 1)
        if not as_paths(self.target):
            raise ValueError("target is empty; name a folder or a list file of images")
        for name in ("target", "out", "init", "source", "resume"):
            check_paths(name, getattr(self, name))
        if self.allow_missing and self.init is None:
            raise ValueError(
                f"allow_missing={self.allow_missing!r} says what a checkpoint may lack and there is none; set init, or "
                "leave allow_missing out"
            )
        if self.data.replay_mode == "balanced" and not as_paths(self.source):
            raise ValueError("data.replay_mode='balanced' needs source images; set source, or use replay_mode union")
        if self.model.bn == "split" and not self.data.drop_last:
            raise ValueError("model.bn='split' needs whole batches; set data.drop_last to true, or use bn plain")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of one backbone on folders of images (Li et al. 2021, Section 4).

    Args:
        checkpoint: exported backbone, run folder, or any checkpoint ``init`` takes.
        train: training folder; with class sub-folders the labeled metrics are computed.
        test: test folder with the same classes.
        source: source folder, for forgetting and drift.
        before: checkpoint to compare with (usually the initialization).
        out: folder for eval.json and report.html.
        arch: network of a checkpoint that does not say it.
        stem: stem of a checkpoint that does not say it.
        size: network input side, pixels.
        resize: shorter side before the center crop; 0 means size * 256 / 224.
        batch_size: images a step.
        shots: labeled images a class of the few-shot runs; empty leaves them out.
        trials: seeds per figure.
        fewshot_epochs: epochs of each few-shot finetuning.
        fewshot_lr: learning rate of the new FC.
        fewshot_backbone_lr: learning rate of the backbone.
        fewshot_crop_scale: area range of the random resized crop; (1, 1) leaves the crop out (small images).
        fewshot_flip_p: probability of the horizontal flip; 0 leaves it out (digits, letters).
        semi_shots: labeled images a class of the FixMatch runs; empty leaves them out.
        semi_epochs: passes over the unlabeled images of each FixMatch run.
        semi_batch: labeled images a step of FixMatch; seven times as many unlabeled ones join.
        kmeans_restarts: K-means restarts, the lowest inertia is kept.
        tsne_points: images of the t-SNE map; 0 leaves it out.
        gallery: query images of the report's gallery; 0 leaves it out.
        cache: folder that keeps features by content hash; none keeps nothing.
        seed: seed of draws and K-means.
        device: auto, cuda or cpu.
        precision: auto is bf16 on a GPU and fp32 on a CPU.
        loader: dali, torch or auto.
    """

    checkpoint: str
    train: str
    test: str | None = None
    source: str | None = None
    before: str | None = None
    out: str = "runs/eval"
    arch: str | None = None
    stem: Literal["imagenet", "small"] | None = None
    size: int = 224
    resize: int = 0
    batch_size: int = 256
    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    trials: int = 3
    fewshot_epochs: int = 30
    fewshot_lr: float = 3.0
    fewshot_backbone_lr: float = 1e-4
    fewshot_crop_scale: tuple[float, float] = (0.08, 1.0)
    fewshot_flip_p: float = 0.5
    semi_shots: list[int] = field(default_factory=list)
    semi_epochs: int = 30
    semi_batch: int = 64
    kmeans_restarts: int = 5
    tsne_points: int = 1000
    gallery: int = 24
    cache: str | None = None
    seed: int = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    loader: Literal["auto", "dali", "torch"] = "auto"

    def __post_init__(self) -> None:
        for name in ("checkpoint", "train", "test", "source", "before", "out"):
            check_paths(name, getattr(self, name))
        if self.stem is not None:
            check_choice("stem", self.stem, ("imagenet", "small"))
        check_choice("loader", self.loader, ("auto", "dali", "torch"))
        check_range("size", self.size, 8)
        check_range("resize", self.resize, 0)
        check_range("batch_size", self.batch_size, 1)
        check_range("trials", self.trials, 1)
        check_range("fewshot_epochs", self.fewshot_epochs, 1)
        check_range("fewshot_lr", self.fewshot_lr, 0.0, low_open=True)
        check_range("fewshot_backbone_lr", self.fewshot_backbone_lr, 0.0)
        check_range("kmeans_restarts", self.kmeans_restarts, 1)
        check_range("tsne_points", self.tsne_points, 0)
        check_range("gallery", self.gallery, 0)
        check_choice("device", self.device, ("auto", "cuda", "cpu"))
        check_choice("precision", self.precision, ("auto", "bf16", "fp32"))
        check_range("fewshot_flip_p", self.fewshot_flip_p, 0.0, 1.0)
        low, high = self.fewshot_crop_scale
        check_range("fewshot_crop_scale[0]", low, 0.0, high, low_open=True)
        check_range("fewshot_crop_scale[1]", high, low, 1.0)
        for shot in self.shots:
            check_range("shots", shot, 1)
        for shot in self.semi_shots:
            check_range("semi_shots", shot, 1)
        check_range("semi_epochs", self.semi_epochs, 1)
        check_range("semi_batch", self.semi_batch, 1)


TABLES = ("1", "2", "3", "4", "5", "6", "text")
FIGURES = (1,)
DATASETS = ("caltech101", "pet", "cifar100", "food101")


@dataclass(frozen=True)
class WeightsConfig:
    """Pretrained checkpoints; a missing one is trained on the source where the scale has a recipe for it.

    Args:
        unsupervised_resnet50: MoCoV2 ResNet-50, 800 epochs (Tables 1, 2, 5, 6).
        supervised_bit_resnet50: BiT-S-R50x1.npz (Table 3).
        supervised_bit_resnet101: BiT-S-R101x1.npz (Table 4).
    """

    unsupervised_resnet50: str | None = None
    supervised_bit_resnet50: str | None = None
    supervised_bit_resnet101: str | None = None


@dataclass(frozen=True)
class ReproduceConfig:
    """Rerun the paper's tables (Li et al. 2021) and set the figures beside the paper's.

    Args:
        out: folder for runs, evaluations and tables; finished parts are kept.
        tables: which tables; text is the forgetting of the source.
        figure: which figures.
        datasets: which target data sets.
        data: folder of the data sets as published; the tiny scale makes its own.
        source: source set, in class folders or .tar shards; by default DATA/imagenet/train.
        forgetting: labeled source images that are clustered; by default all of the source.
        weights: pretrained checkpoints.
        scale: paper, or tiny: the same grid on embedded images, on a CPU.
        trials: draws and starts a figure.
        seeds: trainings a backbone; trials multiply.
        processes: processes of each training on this machine, one a GPU.
        stage: pretrain (pretrained backbones only), runs (trainings and evaluations), tables (from what is there), all.
        task: index of this task in a job array, which shares the work of a stage.
        tasks: tasks of the job array.
        dry_run: print the plan and stop.
        rate: training images a second that `fastuft bench step` measured; the plan then shows hours.
        loader: dali, torch or auto.
    """

    out: str = "runs/reproduce"
    tables: list[str] = field(default_factory=lambda: list(TABLES))
    figure: list[int] = field(default_factory=lambda: list(FIGURES))
    datasets: list[str] = field(default_factory=lambda: list(DATASETS))
    data: str | None = None
    source: str | None = None
    forgetting: str | None = None
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    scale: Literal["paper", "tiny"] = "paper"
    trials: int = 3
    seeds: int = 1
    processes: int = 1
    stage: Literal["all", "pretrain", "runs", "tables"] = "all"
    task: int = 0
    tasks: int = 1
    dry_run: bool = False
    rate: float | None = None
    loader: Literal["auto", "dali", "torch"] = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("tables", TABLES), ("figure", FIGURES), ("datasets", DATASETS)):
            for value in getattr(self, name):
                check_choice(name, value, allowed)
        check_choice("scale", self.scale, ("paper", "tiny"))
        check_choice("stage", self.stage, ("all", "pretrain", "runs", "tables"))
        for name in ("trials", "seeds", "processes", "tasks"):
            check_range(name, getattr(self, name), 1)
        check_range("task", self.task, 0, self.tasks - 1)
        if self.rate is not None:
            check_range("rate", self.rate, 0.0, low_open=True)
