"""The paper's trainings as recipes, and the two scales at which they run: the paper's, and a tiny one for a CPU.

A :class:`Scale` has every size of a grid. The recipes and the code that runs them are the same for both scales. Figures in the
docstrings are those of Li et al. 2021, in per cent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastuft.config import (
    AugmentConfig,
    BatchNormMode,
    ClusteringConfig,
    DataConfig,
    EvalConfig,
    FewShotConfig,
    MapConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    SemiConfig,
    TrainConfig,
)
from fastuft.data import SMALL_IMAGES
from fastuft.reproduce.datasets import LAYOUTS, Sizes
from fastuft.reproduce.grid import Backbone
from fastuft.reproduce.tiny import write_tiny_datasets


@dataclass(frozen=True)
class Training:
    """Epochs, learning rate and batch size of one kind of training."""

    epochs: int
    lr: float
    batch_size: int


@dataclass(frozen=True)
class Scale:
    """Every size of a grid.

    Args:
        archs: the network for each (pretraining, network) in the paper's tables.
        sizes: images and classes by data set.
        source: source folder below the data root.
        source_size: number of images in it.
        pretraining: MoCoV2 pretraining on the source.
        scratch: MoCoV2 on the target, from random weights.
        finetuning: unsupervised finetuning.
        supervised: supervised pretraining on the source's classes if no checkpoint is given; None requires a checkpoint.
        method: temperature, queue and moving average.
        augment: views of the training streams.
        evaluation: settings of every evaluation, whose folders are filled in.
        stem: stem of the networks.
        bn: batch statistics of the encoders.
        caltech_per_class: training images per class of Caltech101.
        replay_fraction: share of the source that joins training.
        runtime: how the machine is used.
        write_data: makes the data sets if no data root is given; None requires a data root.
    """

    archs: Mapping[tuple[str, str], str]
    sizes: Mapping[str, Sizes]
    source: str
    source_size: int
    pretraining: Training
    scratch: Training
    finetuning: Training
    supervised: Training | None
    method: MethodConfig
    augment: AugmentConfig
    evaluation: EvalConfig
    stem: Literal["imagenet", "small"] = "imagenet"
    bn: BatchNormMode = "auto"
    caltech_per_class: int = 30
    replay_fraction: float = DataConfig.replay_fraction
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    write_data: Callable[[Path], str] | None = None


@dataclass(frozen=True)
class Recipe:
    """How one method of the tables is trained.

    Args:
        training: epochs, learning rate and batch size.
        on_source: whether it trains on the source instead of the target.
        pretrained: whether it starts from the pretrained backbone and prefills the queue; otherwise both start at random.
        replay: whether the fixed share of the source joins.
        mix: how to make the mixed query.
    """

    training: Training
    on_source: bool = False
    pretrained: bool = True
    replay: bool = False
    mix: Literal["none", "cutmix", "mixup"] = "none"


def mocov2_pretraining(scale: Scale) -> Recipe:
    """MoCoV2 on the source: learning rate 0.24, batch size 2048, 800 epochs, cosine.

    ``torchrun --nproc-per-node 8 -m fastuft.cli pretrain --target imagenet/train --out runs/mocov2``

    Table 2, without finetuning: Caltech101 few-shot 45.49 (K = 1), 84.45 (K = 8), retrieval 83.14, clustering 56.16.
    """
    return Recipe(scale.pretraining, on_source=True, pretrained=False)


def from_scratch(scale: Scale) -> Recipe:
    """Unsup-T: MoCoV2 on the target, from random weights.

    ``fastuft pretrain --target pets/train --data.batch_size 256 --optim.lr 0.03 --out runs/scratch``

    Table 1: Pet few-shot 9.08, 10.97, 12.64 (K = 2, 4, 8); Caltech101 18.69, 27.17, 38.27.
    """
    return Recipe(scale.scratch, pretrained=False)


def naive(scale: Scale) -> Recipe:
    """Contrastive learning continues on the target alone: learning rate 0.015, batch size 256, 200 epochs, cosine.

    ``fastuft finetune --recipe paper --init mocov2.pth --target pets/train --method.mix none --out runs/naive``

    Table 2: Pet few-shot 40.01 (K = 1), 72.92 (K = 8), retrieval 63.73, clustering 47.31: below the pretrained backbone.
    """
    return Recipe(scale.finetuning)


def replayed(scale: Scale) -> Recipe:
    """Naive with sparse source data replaying.

    ``fastuft finetune --recipe paper --init mocov2.pth --target pets/train --source imagenet/train --method.mix none
    --out runs/sdr``

    Table 6: Pet few-shot 62.81, 71.35, 75.14 (K = 2, 4, 8).
    """
    return Recipe(scale.finetuning, replay=True)


def unsupervised_finetuning(scale: Scale) -> Recipe:
    """The full method: replaying and data mixing.

    ``fastuft finetune --recipe paper --init mocov2.pth --target pets/train --source imagenet/train --out runs/ours``

    Table 2: Pet few-shot 60.35 (K = 1), 79.88 (K = 8), retrieval 71.67, clustering 56.11.
    """
    return Recipe(scale.finetuning, replay=True, mix="cutmix")


RECIPES: dict[str, Callable[[Scale], Recipe]] = {
    "unsup_S": mocov2_pretraining,
    "unsup_T": from_scratch,
    "naive": naive,
    "naive_sdr": replayed,
    "ours": unsupervised_finetuning,
}


def train_config(backbone: Backbone, scale: Scale, *, target: str, source: str, init: str, out: str) -> TrainConfig:
    """The training that makes a backbone.

    Args:
        backbone: the backbone to make.
        scale: sizes.
        target: training images of its data set.
        source: the source folder.
        init: the pretrained backbone.
        out: run folder.
    """
    recipe = RECIPES[backbone.method](scale)
    return TrainConfig(
        target=source if recipe.on_source else target,
        source=source if recipe.replay else None,
        init=init if recipe.pretrained else None,
        out=out,
        seed=backbone.seed,
        resume="auto",
        model=ModelConfig(arch=scale.archs[backbone.pretraining, backbone.network], stem=scale.stem, bn=scale.bn),
        method=dataclasses.replace(scale.method, mix=recipe.mix, queue_prefill=recipe.pretrained),
        augment=scale.augment,
        data=DataConfig(batch_size=recipe.training.batch_size, replay_fraction=scale.replay_fraction),
        optim=OptimConfig(lr=recipe.training.lr, epochs=recipe.training.epochs),
        runtime=scale.runtime,
    )


FILLED_IN = "filled in"  # stands for the paths of an evaluation until they are known

PAPER = Scale(
    archs={
        ("unsupervised", "resnet50"): "resnet50",
        ("supervised_bit", "resnet50"): "bit_resnet50",
        ("supervised_bit", "resnet101"): "bit_resnet101",
    },
    sizes={name: layout.sizes for name, layout in LAYOUTS.items()},
    source="imagenet/train",
    source_size=1_281_167,
    pretraining=Training(epochs=800, lr=0.24, batch_size=2048),
    # The paper is silent; these are MoCoV2's learning rate for batch size 256 and its 800 epochs.
    scratch=Training(epochs=800, lr=0.03, batch_size=256),
    finetuning=Training(epochs=200, lr=0.015, batch_size=256),
    supervised=None,
    method=MethodConfig(),
    augment=AugmentConfig(),
    evaluation=EvalConfig(checkpoint=FILLED_IN, train=FILLED_IN, size=224, gallery=0),
)

# The demo's network, views and learning rates, but shorter, because the grid has 24 trainings and 34 evaluations.
TINY = Scale(
    archs={
        ("unsupervised", "resnet50"): "resnet_tiny",
        ("supervised_bit", "resnet50"): "bit_resnet_tiny",
        ("supervised_bit", "resnet101"): "bit_resnet_tiny",
    },
    sizes=dict.fromkeys(LAYOUTS, Sizes(300, None, 10)),
    source="demo/source",
    source_size=4000,
    pretraining=Training(epochs=20, lr=0.12, batch_size=128),
    scratch=Training(epochs=20, lr=0.12, batch_size=128),
    finetuning=Training(epochs=20, lr=0.06, batch_size=128),
    supervised=Training(epochs=8, lr=0.1, batch_size=128),
    method=MethodConfig(queue_size=2048, key_momentum=0.99),
    augment=SMALL_IMAGES,
    evaluation=EvalConfig(
        checkpoint=FILLED_IN,
        train=FILLED_IN,
        size=SMALL_IMAGES.size,
        resize=SMALL_IMAGES.size,
        # Learning rates chosen for few-shot finetuning of this network on held-out training digits; FixMatch uses them too.
        fewshot=FewShotConfig(epochs=15, lr=1.0, backbone_lr=1e-2, crop_scale=(1.0, 1.0), flip_p=0.0),
        semi=SemiConfig(epochs=15, batch_size=16),
        clustering=ClusteringConfig(restarts=3),
        map=MapConfig(points=300),
        gallery=0,
    ),
    stem="small",
    bn="plain",
    runtime=RuntimeConfig(tensorboard=False),
    write_data=lambda root: write_tiny_datasets(root, num_train=300, num_glyphs=4000),
)

SCALES = {"paper": PAPER, "tiny": TINY}
