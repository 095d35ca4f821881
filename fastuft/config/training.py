"""Options of a training run.

One tree describes a run completely: the command line builds it, the run folder stores it as ``config.yaml``, and loading
that file repeats the run. Defaults are the paper's recipe for unsupervised finetuning (learning rate 0.015, batch size 256,
200 epochs, K = 65536, tau = 0.2); the command line and ``fastuft.finetune`` leave ``AUTO_OPTIONS`` to the run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastuft.config.checks import (
    AtLeast0,
    AtLeast1,
    AutoAtLeast1,
    AutoAtLeast2,
    AutoFraction,
    AutoNonNegative,
    AutoPositive,
    AutoSide,
    Fraction,
    NonNegative,
    PathName,
    Paths,
    Positive,
    Range,
    Span,
    Threads,
    as_paths,
    check_range,
    check_values,
    is_auto,
)
from fastuft.config.presets import Optimizer, Preset

Mix = Literal["none", "cutmix", "mixup"]
BatchNormMode = Literal["auto", "plain", "split", "shuffle", "sync", "frozen"]
Pool = Literal["own", "cls", "mean"]
AdamBeta = Annotated[float, Range(0.0, 0.99999)]

# What ``recipe: auto`` chooses for the data and the machine where it is left at auto, in this order.
AUTO_OPTIONS = (
    "augment.size",
    "data.replay_fraction",
    "data.batch_size",
    "model.bn",
    "method.queue_size",
    "optim.epochs",
    "method.key_momentum",
    "optim.lr",
    "optim.warmup_epochs",
    "select",
)


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, projection head and key encoder.

    Args:
        arch: resnet18 | resnet34 | resnet50 | resnet101, resnet_tiny (the demo's three-block network),
            bit_resnet50 | bit_resnet101 (ResNet-v2 with GroupNorm and weight standardization), or timm:NAME.
        stem: imagenet (7x7, stride 2, max-pool) or small (3x3, no max-pool; stride 1, or 2 in resnet_tiny); never inferred.
        head_dim: width D of the embedding.
        bn: batch statistics of the encoders; auto is split on one device (plain with ``recipe: auto``) and shuffle on
            several; frozen keeps those of ``init``. Networks without BatchNorm ignore it.
        bn_group: images per group in ``split``; must divide the batch of one device.
        pool: features of a ViT: own (as in the network or the checkpoint), cls (the class token) or mean (of the patch
            tokens, without class and register tokens).
        drop_path: rate of stochastic depth in the query encoder's last block, rising from 0 in the first; the key encoder
            drops nothing.
        freeze_patch: do not train a ViT's patch projection, whose gradient makes contrastive training of ViTs unstable
            (Chen, Xie and He 2021).
    """

    arch: str = "resnet50"
    stem: Literal["imagenet", "small"] = "imagenet"
    head_dim: AtLeast1 = 128
    bn: BatchNormMode = "auto"
    bn_group: Annotated[int, Range(2)] = 32
    pool: Pool = "own"
    drop_path: Annotated[float, Range(0.0, 0.99)] = 0.0
    freeze_patch: bool = False

    def __post_init__(self) -> None:
        check_values(self, "model")


@dataclass(frozen=True)
class MethodConfig:
    """MoCoV2 and the paper's two additions (Li et al. 2021, Eq. 4-6).

    Args:
        temperature: tau.
        queue_size: K, negatives kept.
        queue_dtype: what the queue is kept in; auto is fp32 on a CPU, and on a GPU the dtype that its matrix
            products run in. fp8 (e4m3, a scale per key) takes half of bf16's memory and
            multiplies in bf16 or fp16; docs/loss.md has its errors.
        key_momentum: m of the key encoder's moving average.
        queue_prefill: fill the queue with keys of training images before epoch 0 (finetuning) or start
            from random unit rows (pretraining).
        mix: how the mixed query of Eq. 5 is made.
        mix_weight: w in L = L_q + w L_m.
        mix_only: train on L_m alone (about 2/3 of the cost).
        alpha: parameter of lambda ~ Beta(alpha, alpha).
        mix_per: one lambda and box per batch, or per pair.
    """

    temperature: Positive = 0.2
    queue_size: AutoAtLeast1 = 65536
    queue_dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    key_momentum: AutoFraction = 0.999
    queue_prefill: bool = True
    mix: Mix = "cutmix"
    mix_weight: NonNegative = 1.0
    mix_only: bool = False
    alpha: Positive = 1.0
    mix_per: Literal["batch", "pair"] = "batch"

    def __post_init__(self) -> None:
        check_values(self, "method")
        if self.mix_only and self.mix == "none":
            raise ValueError("method.mix_only=True needs a mixed query; set method.mix to cutmix or mixup")


@dataclass(frozen=True)
class AugmentConfig:
    """The random views of a training image (as in MoCoV2; ``fastuft.data.SMALL_IMAGES`` suits 32 px).

    Args:
        size: side of the square crop, pixels.
        crop_scale: area range of the random resized crop.
        crop_ratio: aspect range of the random resized crop.
        brightness: jitter strength.
        contrast: jitter strength.
        saturation: jitter strength.
        hue: jitter strength.
        jitter_p: probability of the color jitter.
        grayscale_p: probability of conversion to gray.
        blur_sigma: range of the Gaussian blur's sigma, pixels.
        blur_p: probability of the blur.
        flip_p: probability of the horizontal flip.
        rotation: rotations are drawn from +-rotation degrees; 0 turns them off.
    """

    size: AutoSide = 224
    crop_scale: Annotated[tuple[float, float], Span(top=1.0)] = (0.2, 1.0)
    crop_ratio: Annotated[tuple[float, float], Span()] = (3 / 4, 4 / 3)
    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.4
    hue: Annotated[float, Range(0.0, 0.5)] = 0.1
    jitter_p: Fraction = 0.8
    grayscale_p: Fraction = 0.2
    blur_sigma: Annotated[tuple[float, float], Span()] = (0.1, 2.0)
    blur_p: Fraction = 0.5
    flip_p: Fraction = 0.5
    rotation: Annotated[float, Range(0.0, 180.0)] = 0.0

    def __post_init__(self) -> None:
        check_values(self, "augment")


@dataclass(frozen=True)
class DataConfig:
    """Streams of training images.

    Args:
        batch_size: global batch size: images per step over all ranks.
        replay_fraction: share of the source that joins training (sparse source data replaying).
        replay_seed: seed of the one fixed draw of that share.
        replay_mode: union (one shuffled pass over target and replayed images) or balanced (a fixed source share per batch).
        replay_share: source share of each batch if ``replay_mode`` is balanced.
        replay_cache: folder to copy the drawn source images to once (fast local disk).
        loader: dali, torch, or auto (DALI if installed, otherwise the PyTorch loader; one line says so).
        threads: decoding threads; 0 derives the number from the machine.
        prefetch: batches prepared ahead.
        hw_decoder_load: share of JPEGs given to the GPU's hardware decoder.
        on_bad_file: error names the file and stops; skip replaces it with a good one and counts it.
        drop_last: drop the last partial batch of an epoch (required by ``split`` statistics).
        max_megapixels: size of the largest image that is decoded, in megapixels.
        read_timeout: seconds that reading one file may take; a file that takes longer counts as bad.
        readers: threads that read images ahead of the decoder; 0 uses 16, or 64 if they come over a network.
        suffixes: suffixes of images in folders and shards, in any case; others that Pillow decodes may be added (.tif,
            .gif), and "" for names without a suffix.
    """

    batch_size: AutoAtLeast2 = 256
    replay_fraction: AutoFraction = 0.1
    replay_seed: int = 0
    replay_mode: Literal["union", "balanced"] = "union"
    replay_share: Fraction = 0.5
    replay_cache: str | None = None
    loader: Literal["auto", "dali", "torch"] = "auto"
    threads: Threads = 0
    prefetch: AtLeast1 = 2
    hw_decoder_load: Fraction = 0.9
    on_bad_file: Literal["error", "skip"] = "error"
    drop_last: bool = True
    max_megapixels: Positive = 180.0
    read_timeout: Positive = 60.0
    readers: AtLeast0 = 0
    suffixes: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

    def __post_init__(self) -> None:
        check_values(self, "data")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule.

    Args:
        preset: source of the values of options that are not given: a family (resnet, vit, convnext), auto by
            ``model.arch``, or none for the paper's. The command line and ``fastuft.finetune`` fill them in; a configuration
            made in Python keeps its own values (see ``fastuft.config.preset_options``).
        lr: learning rate for the configured batch size; see ``scale_lr``.
        scale_lr: multiply ``lr`` by batch_size / 256 (linear scaling; off by default).
        momentum: momentum of SGD and LARS.
        betas: decay rates of AdamW's two averages.
        weight_decay: weight decay: on the gradient in SGD and LARS, on the weights in AdamW.
        decay_norms: also decay norms, biases, position embeddings and tokens, as MoCo does; LARS never does.
        layer_decay: learning rate of a layer relative to the next layer's; the head has the full rate. 1 gives equal rates.
        epochs: passes over target and replayed images.
        schedule: cosine to zero over all steps, or constant.
        warmup_epochs: linear warm-up from zero.
        head_warmup_epochs: epochs at the start that train only the head.
        clip_grad: largest gradient norm; 0 is off.
        optimizer: sgd, adamw, lars (needs timm), or apex_fused_sgd (needs NVIDIA's apex).
    """

    preset: Preset = "none"
    lr: AutoPositive = 0.015
    scale_lr: bool = False
    momentum: Fraction = 0.9
    betas: tuple[AdamBeta, AdamBeta] = (0.9, 0.999)
    weight_decay: NonNegative = 1e-4
    decay_norms: bool = True
    layer_decay: Annotated[float, Range(0.0, 1.0, low_open=True)] = 1.0
    epochs: AutoAtLeast1 = 200
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: AutoNonNegative = 0.0
    head_warmup_epochs: NonNegative = 0.0
    clip_grad: NonNegative = 0.0
    optimizer: Optimizer = "sgd"

    def __post_init__(self) -> None:
        check_values(self, "optim")
        for name in ("warmup_epochs", "head_warmup_epochs"):
            value = getattr(self, name)
            if not is_auto(value) and not is_auto(self.epochs):
                check_range(f"optim.{name}", value, 0.0, self.epochs, remedy="it is a part of optim.epochs")


@dataclass(frozen=True)
class RuntimeConfig:
    """How the run uses the machine.

    Args:
        device: auto (cuda if present), cuda or cpu.
        precision: auto is bf16 on a GPU and fp32 on a CPU; fp16 uses a GradScaler.
        compile: torch.compile the encoders.
        checkpoint_activations: recompute each block's activations in the backward pass instead of storing them, which takes
            less memory and about a third more time.
        deterministic: bit-exact reruns on a GPU, at some cost; runs on a CPU always are.
        log_every: steps between metric rows.
        save_every: steps between checkpoints; 0 saves once per epoch.
        keep_last: how many of the newest checkpoints to keep.
        keep_every: also keep checkpoints whose step is a multiple of this; 0 keeps no others.
        tensorboard: write TensorBoard events beside metrics.jsonl.
        wandb: log to Weights & Biases if it is installed.
        timeout: seconds after which ranks that wait for a lost rank give up.
    """

    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: bool = False
    checkpoint_activations: bool = False
    deterministic: bool = False
    log_every: AtLeast1 = 10
    save_every: AtLeast0 = 0
    keep_last: AtLeast1 = 2
    keep_every: AtLeast0 = 0
    tensorboard: bool = True
    wandb: bool = False
    timeout: Positive = 600.0

    def __post_init__(self) -> None:
        check_values(self, "runtime")


@dataclass(frozen=True)
class WatchConfig:
    """Optional evaluation during training.

    Args:
        train: labeled folder that is the gallery of retrieval.
        test: labeled folder whose images are the queries.
        source: source folder whose clustering is watched (forgetting).
        every_epochs: epochs between evaluations; 0 is off.
    """

    train: str | None = None
    test: str | None = None
    source: str | None = None
    every_epochs: AtLeast0 = 0

    def __post_init__(self) -> None:
        check_values(self, "watch")
        if self.every_epochs and not (self.source or (self.train and self.test)):
            raise ValueError(
                f"watch.every_epochs={self.every_epochs} needs something to watch; "
                "set watch.train and watch.test, or watch.source"
            )


@dataclass(frozen=True)
class VerdictConfig:
    """Looks at the features during finetuning, and the verdict without labels that they lead to.

    Args:
        looks: looks during the run, besides the one at its start; 0 turns the verdict off.
        images: images of the fixed sample, from the target and from the source each.
    """

    looks: AtLeast0 = 5
    images: AtLeast1 = 256

    def __post_init__(self) -> None:
        check_values(self, "verdict")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: finetuning (with ``init``) or pretraining (without).

    Args:
        target: unlabeled images: a folder, a list file (.txt), or several of them as '[a, b]'.
        out: run folder.
        init: checkpoint to start from: a file, a transformers folder or a run (docs/checkpoints.md lists the layouts);
            none starts with random weights.
        init_key: prefix of one of several backbones in ``init`` (encoder_k, teacher); none takes the one that was trained
            by gradients.
        init_channels: channels of its first convolution; auto is RGB or what the layout says, bgr and gray are converted.
        allow_missing: patterns of backbone tensors that ``init`` may lack.
        source: source images for replaying: a folder, a list file, or several as '[a, b]'; none trains only on the target.
        seed: seed of initialization, order and augmentation.
        resume: no starts a new run and refuses a folder that has one; auto continues from the newest whole checkpoint in
            ``out``, or starts a new run; a path names the checkpoint.
        recipe: what becomes of options that are auto: auto chooses them for the data and the machine and says why, paper takes
            the paper's.
        max_steps: stop after this many steps (the schedule still spans all epochs).
        select: which weights are exported: last, those of the last step, or judged, those that the verdict without labels
            finds best; the start's where none is better. auto is left to the recipe.
        stop: never, or judged: end early where the verdict sees no use in going on.
        model: the network.
        method: the loss and its additions.
        augment: the views.
        data: the streams.
        optim: the optimizer.
        runtime: the machine.
        watch: evaluation during training.
        verdict: looks without labels during finetuning.
    """

    target: Paths
    out: PathName
    init: PathName | None = None
    init_key: str | None = None
    init_channels: Literal["auto", "rgb", "bgr", "gray"] = "auto"
    allow_missing: list[str] = field(default_factory=list)
    source: Paths | None = None
    seed: int = 0
    resume: PathName = "no"
    recipe: Literal["auto", "paper"] = "paper"
    max_steps: AtLeast1 | None = None
    select: Literal["auto", "last", "judged"] = "last"
    stop: Literal["never", "judged"] = "never"
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    verdict: VerdictConfig = field(default_factory=VerdictConfig)

    def __post_init__(self) -> None:
        check_values(self)
        if self.recipe == "paper":
            self._take_the_papers()
        if not as_paths(self.target):
            raise ValueError("target is empty; name a folder or a list file of images")
        for name, default in (("init_key", None), ("init_channels", "auto"), ("allow_missing", [])):
            if self.init is None and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} says how to read a checkpoint, but there is none; set init, or leave "
                    f"{name} out"
                )
        if "judged" in (self.select, self.stop) and (self.init is None or not self.verdict.looks):
            raise ValueError(
                f"select={self.select!r}, stop={self.stop!r}: a verdict compares with the start; set init and "
                "verdict.looks, or use select last and stop never"
            )
        if self.data.replay_mode == "balanced" and not as_paths(self.source):
            raise ValueError("data.replay_mode='balanced' needs source images; set source, or use replay_mode union")
        if self.model.bn == "split" and not self.data.drop_last:
            raise ValueError("model.bn='split' needs whole batches; set data.drop_last to true, or use bn plain")

    def _take_the_papers(self) -> None:
        """Put the paper's values, which are the defaults here, in the place of those that are auto."""
        for group in dataclasses.fields(self):
            value = getattr(self, group.name)
            if dataclasses.is_dataclass(value):
                options = [
                    option for option in dataclasses.fields(value) if f"{group.name}.{option.name}" in AUTO_OPTIONS
                ]
                papers = {o.name: o.default for o in options if is_auto(getattr(value, o.name))}
                if papers:
                    object.__setattr__(self, group.name, dataclasses.replace(value, **papers))  # type: ignore[type-var]
            elif group.name in AUTO_OPTIONS and is_auto(value):
                object.__setattr__(self, group.name, group.default)
