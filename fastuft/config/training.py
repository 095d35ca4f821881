"""The options of a training run, in groups; each group has a module of its own.

The tree of options describes a run completely: the command line builds it, the run folder stores it as ``config.yaml``, and
loading that file repeats the run. Defaults are the paper's recipe for unsupervised finetuning (learning rate 0.015, batch size
256, 200 epochs, K = 65536, tau = 0.2); the command line and ``fastuft.finetune`` leave ``AUTO_OPTIONS`` to the run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from fastuft.config.checks import AtLeast1, AutoFraction, PathName, Paths, as_paths, check_values, is_auto
from fastuft.config.data import AugmentConfig, DataConfig
from fastuft.config.method import MethodConfig
from fastuft.config.model import ModelConfig
from fastuft.config.optim import OptimConfig
from fastuft.config.runtime import RuntimeConfig
from fastuft.config.watch import VerdictConfig, WatchConfig

# The options that ``recipe: auto`` chooses for the data and the machine if they are auto, in this order.
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
    "start_share",
)


# What the command line and ``fastuft.finetune`` take from the checkpoint where it is left at auto, before all of the above.
NETWORK_OPTIONS = ("model.arch", "model.stem")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: finetuning (with ``init``) or pretraining (without).

    Args:
        target: unlabeled images: a folder, a list file, shards or a URL, or several of them as '[a, b]'.
        out: run folder.
        init: checkpoint to start from: a file, a transformers folder or a run (docs/checkpoints.md lists the layouts);
            none starts with random weights.
        init_key: prefix of one of several backbones in ``init`` (encoder_k, teacher); none takes the one that was trained
            by gradients.
        init_channels: channels of its first convolution; auto is RGB or what the layout says, bgr and gray are converted.
        allow_missing: patterns of backbone tensors that ``init`` may lack.
        source: source images for replaying, named like the target; none trains only on the target.
        seed: seed of initialization, order and augmentation.
        resume: no starts a new run and refuses a folder that has one; auto continues from the newest whole checkpoint in
            ``out``, or starts a new run; a path names the checkpoint.
        recipe: how options that are auto are set: auto chooses them for the data and the machine and gives reasons, paper
            takes the paper's values.
        max_steps: stop after this many steps (the schedule still spans all epochs).
        select: which weights are exported: last, those of the last step, or judged, those that the verdict without labels
            finds best (those of the start if none is better). auto leaves it to the recipe.
        start_share: share of the start in the weights that are looked at and exported: 0 leaves the trained weights as they
            are, 0.2 averages them with a fifth of the start's (WiSE-FT). auto leaves it to the recipe.
        stop: never, or judged: end early if the verdict expects no further gain.
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
    start_share: AutoFraction = 0.0
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
        if self.init is None and not is_auto(self.start_share) and self.start_share:
            raise ValueError(
                f"start_share={self.start_share}: without init there is no start to average with; set init, or start_share 0"
            )
        if self.data.replay_mode == "balanced" and not as_paths(self.source):
            raise ValueError("data.replay_mode='balanced' needs source images; set source, or use replay_mode union")
        if self.model.bn == "split" and not self.data.drop_last:
            raise ValueError("model.bn='split' needs whole batches; set data.drop_last to true, or use bn plain")

    def _take_the_papers(self) -> None:
        """Replace auto with the paper's values, which are the defaults here."""
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
