"""A scale far below the tiny one, and a process that runs a grid at that scale."""

from __future__ import annotations

import dataclasses
import sys

from fastuft.config import ClusteringConfig, MapConfig, MethodConfig, ReproduceConfig
from fastuft.reproduce import Sizes, reproduce, training, write_tiny_datasets
from fastuft.reproduce.recipes import TINY, Training

SHORT = Training(epochs=1, lr=0.05, batch_size=32)
MICRO = dataclasses.replace(
    TINY,
    sizes=dict.fromkeys(TINY.sizes, Sizes(200, None, 10)),
    caltech_per_class=20,
    source_size=248,
    pretraining=SHORT,
    scratch=SHORT,
    finetuning=SHORT,
    supervised=SHORT,
    method=MethodConfig(queue_size=64, key_momentum=0.9),
    evaluation=dataclasses.replace(
        TINY.evaluation,
        fewshot=dataclasses.replace(TINY.evaluation.fewshot, epochs=1),
        semi=dataclasses.replace(TINY.evaluation.semi, epochs=1),
        clustering=ClusteringConfig(restarts=1),
        map=MapConfig(points=40),
    ),
    write_data=lambda root: write_tiny_datasets(root, num_train=200, num_glyphs=248),
)


def run_and_count(out: str, stage: str = "all", processes: str = "1", epochs: str = "1") -> None:
    """Run Table 1 on Pet and print every training that this process did, after the word ``trained``."""
    train = training.train

    def counted(config):
        print("trained", config.out, flush=True)
        return train(config)

    training.train = counted
    config = ReproduceConfig(
        out=out,
        tables=["1"],
        datasets=["pet"],
        trials=1,
        scale="tiny",
        figure=[],
        stage=stage,
        processes=int(processes),
    )
    scale = dataclasses.replace(MICRO, pretraining=dataclasses.replace(SHORT, epochs=int(epochs)))
    sys.exit(reproduce(config, scale))


if __name__ == "__main__":
    run_and_count(*sys.argv[1:])
