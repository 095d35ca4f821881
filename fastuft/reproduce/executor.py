"""Runs the unfinished parts of a grid; any number of processes can share an output folder, each part runs in one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from fastuft.config import ReproduceConfig
from fastuft.console import say
from fastuft.reproduce.claims import claim
from fastuft.reproduce.datasets import PreparedDataset, prepare_dataset
from fastuft.reproduce.folders import GridFolders
from fastuft.reproduce.grid import PRETRAINED, Backbone
from fastuft.reproduce.measuring import measure
from fastuft.reproduce.plan import Plan
from fastuft.reproduce.recipes import Scale
from fastuft.reproduce.shards import extract_tar_sample
from fastuft.reproduce.training import finetune, pretrain
from fastuft.trainer import CheckpointError, LostRankError, NonFiniteLossError


class Executor:
    """This task's share of a grid's trainings and evaluations.

    Args:
        plan: the parts.
        config: how to run the grid.
        scale: sizes.
        folders: the output folder.
    """

    def __init__(self, plan: Plan, config: ReproduceConfig, scale: Scale, folders: GridFolders) -> None:
        self.plan, self.config, self.folders = plan, config, folders
        self.failures: dict[str, str] = {}  # the reason by part
        self._scale = scale

    def run(self) -> None:
        """Run this task's share; failed parts are recorded in ``failures``, and parts that depend on them are skipped.

        Raises:
            ValueError: the tasks of a job array have no pretrained backbone to start from.
        """
        with claim(self.folders.out, "data", wait=True):  # one process writes, the others find it written
            root, source = self._locate_data()
        self._run_pretrained(source)
        if self.config.stage == "pretrain":
            return
        with claim(self.folders.out, "data", wait=True):
            datasets = {name: self._prepare(name, root) for name in self.plan.datasets}
        # A unit of work is a backbone with all of its evaluations, so that no task waits for another. A task that has
        # finished its own share takes over what is left of the others'.
        mine = self._mine(self.plan.backbones)
        order = [*mine, *(backbone for backbone in self.plan.backbones if backbone not in mine)]
        marks = {backbone: f"[{number}/{len(order)}] {backbone.name}" for number, backbone in enumerate(order, 1)}
        left = order
        while left:
            held = []
            for backbone in left:
                with claim(self.folders.out, backbone.name) as alone:
                    if alone:
                        self._run_backbone(backbone, marks[backbone], datasets, source)
                    else:
                        held.append(backbone)
            if len(held) == len(left):
                break
            left = held  # the processes that held them may have been killed meanwhile, so try again
        for backbone in left:
            say(f"{marks[backbone]}: another process is working on it")

    @property
    def _how(self) -> tuple[ReproduceConfig, Scale, GridFolders]:
        return self.config, self._scale, self.folders

    def _mine(self, backbones: Sequence[Backbone]) -> list[Backbone]:
        return [item for index, item in enumerate(backbones) if index % self.config.tasks == self.config.task]

    def _run_pretrained(self, source: str) -> None:
        pretrained = [b for b in self.plan.backbones if b.method in PRETRAINED and not self.folders.given(b)]
        if self.config.stage == "pretrain":
            pretrained = self._mine(pretrained)
        elif self.config.tasks > 1 and not all(map(self.folders.trained, pretrained)):
            raise ValueError(
                f"tasks={self.config.tasks}: the pretrained backbones must exist before tasks share the rest; run "
                "stage=pretrain first, or name checkpoints with weights"
            )
        for backbone in pretrained:
            with claim(self.folders.out, backbone.name, wait=True):  # everything after it starts from it
                self._attempt(backbone.name, partial(pretrain, backbone, source, *self._how))

    def _run_backbone(
        self, backbone: Backbone, mark: str, datasets: Mapping[str, PreparedDataset], source: str
    ) -> None:
        """Train one backbone and evaluate it on all of its data sets, unless that is done."""
        if backbone.method not in PRETRAINED:
            target = datasets[backbone.dataset].train
            self._attempt(backbone.name, partial(finetune, backbone, target, source, mark, *self._how))
        if not (self.folders.given(backbone) or self.folders.trained(backbone)) or backbone.name in self.failures:
            return
        for measurement in self.plan.measurements:
            if measurement.backbone == backbone:
                self._attempt(
                    f"{backbone.name} on {measurement.dataset}",
                    partial(measure, measurement, datasets[measurement.dataset], source, mark, *self._how),
                )

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        """Run one part; if it fails, the others continue, and parts that depend on it are skipped."""
        try:
            work()
        except (ValueError, NonFiniteLossError, CheckpointError, LostRankError) as error:
            self.failures[name] = " ".join(str(error).split())
            say(f"{name}: {self.failures[name]}", error=True)

    def _locate_data(self) -> tuple[Path, str]:
        """(data root, source folder); a source in tar shards is unpacked as far as needed."""
        config, scale = self.config, self._scale
        if config.data is not None:
            root, source = Path(config.data), config.source or str(Path(config.data) / scale.source)
        else:
            assert scale.write_data is not None  # checked before
            root = self.folders.data
            source = scale.write_data(root)
        if not any(Path(source).glob("*.tar")):
            return root, source
        needs_all = any(b.method in PRETRAINED and not self.folders.given(b) for b in self.plan.backbones)
        fraction = 1.0 if needs_all else scale.replay_fraction
        if not needs_all:  # only the drawn share is unpacked
            self._scale = dataclasses.replace(scale, replay_fraction=1.0)
        folder = self.folders.source("all" if needs_all else "replayed")
        return root, extract_tar_sample(source, folder, fraction=fraction, seed=0)

    def _prepare(self, name: str, root: Path) -> PreparedDataset:
        return prepare_dataset(
            name,
            root,
            self.folders.datasets,
            sizes=self._scale.sizes[name],
            caltech_per_class=self._scale.caltech_per_class,
        )
