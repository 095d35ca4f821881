"""From the grid to figures: plan, train what is missing, evaluate, and set the results beside the paper's.

Layout of the output folder::

    runs/<backbone>/                   a run folder each
    runs/<backbone>/eval-<data set>/   its evaluation
    datasets/, source/, features/      class folders of the data sets, the drawn source share, cached features
    results.jsonl, comparison.*        every trial's figure, and the tables beside the paper's
    figure1.html                       the maps of Figure 1

Whatever is finished is kept, so the same command goes on after a stop, and the tasks of a job array work side by side.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from fastuft.config import DATASETS, EvalConfig, ReproduceConfig, TrainConfig
from fastuft.evaluate import evaluate_backbone, write_evaluation
from fastuft.model import BACKBONE_FILE, load_backbone
from fastuft.report import load_run, write_comparison, write_report
from fastuft.report.tables import Table
from fastuft.reproduce import grid
from fastuft.reproduce.datasets import LAYOUTS, PreparedDataset, extract_tar_sample, prepare_dataset
from fastuft.reproduce.grid import Backbone, Measurement
from fastuft.reproduce.recipes import RECIPES, SCALES, Scale, train_config
from fastuft.reproduce.supervised import train_supervised
from fastuft.trainer import CheckpointError, LostRankError, NonFiniteLossError, train

RESULTS = "results.jsonl"
# A run's settings that change none of its figures.
_NEUTRAL = ("resume", "runtime", "out", "watch", "max_steps")
# An evaluation that measured more than is wanted serves as well.
_GROWING = ("shots", "semi_shots", "tsne_points", "source", "cache", "out")


class Grid:
    """One grid at one scale in one output folder."""

    def __init__(self, config: ReproduceConfig, scale: Scale | None = None) -> None:
        self.config = config
        self.scale = scale or SCALES[config.scale]
        self.out = Path(config.out)
        self.cells = grid.select_cells(config.tables, config.datasets)
        self.measurements = grid.measurements(self.cells, config.figure, config.datasets, config.seeds)
        if not self.measurements:
            raise ValueError(
                f"tables={config.tables}, figure={config.figure} and datasets={config.datasets} have no cell in common; "
                "name more of them"
            )
        self.backbones = grid.backbones(self.measurements)
        self.failures: dict[str, str] = {}

    def _folder(self, backbone: Backbone) -> Path:
        return self.out / "runs" / backbone.name

    def _evaluation_folder(self, measurement: Measurement) -> Path:
        # A given checkpoint has one run folder for all seeds of its evaluation.
        repeat = f"-seed{measurement.seed}" if measurement.seed != measurement.backbone.seed else ""
        return self._folder(measurement.backbone) / f"eval-{measurement.dataset}{repeat}"

    def _checkpoint(self, backbone: Backbone) -> str:
        given = _given(self.config, backbone) if backbone.method in grid.PRETRAINED else None
        return given or str(self._folder(backbone))

    def _trained_here(self, backbone: Backbone) -> bool:
        return backbone.method not in grid.PRETRAINED or _given(self.config, backbone) is None

    def _done(self, backbone: Backbone) -> bool:
        return (self._folder(backbone) / BACKBONE_FILE).exists()

    def plan(self) -> Table:
        """Every training and evaluation with its images and steps; hours from the given rate only."""
        rate = self.config.rate
        headers = ["work", "images", "epochs", "steps", "images in all", *(["hours"] if rate else []), "state"]
        rows = []
        for backbone in filter(self._trained_here, self.backbones):
            images, epochs, batch = self._length(backbone)
            total = epochs * (images // batch) * batch
            hours = [f"{total / rate / 3600:.1f}"] if rate else []
            state = "done" if self._done(backbone) else "to do"
            rows.append(
                [
                    f"train {backbone.name}",
                    f"{images:,}",
                    f"{epochs}",
                    f"{total // batch:,}",
                    f"{total:,}",
                    *hours,
                    state,
                ]
            )
        for measurement in self.measurements:
            images, trained = self._evaluation_size(measurement)
            state = "done" if (self._evaluation_folder(measurement) / "eval.json").exists() else "to do"
            what = f"evaluate {measurement.backbone.name} on {measurement.dataset}"
            rows.append([what, f"{images:,}", "", "", f"{trained:,}", *([""] if rate else []), state])
        total_images = sum(int(row[4].replace(",", "")) for row in rows)
        hours_in_all = [f"{sum(float(row[5] or 0) for row in rows):.1f}"] if rate else []
        rows.append(["all", "", "", "", f"{total_images:,}", *hours_in_all, ""])
        return Table(headers, rows)

    def _length(self, backbone: Backbone) -> tuple[int, int, int]:
        """(images of an epoch, epochs, batch) of a training."""
        scale = self.scale
        if backbone.method == "sup_S":
            training = self._supervised()
            return scale.source_size, training.epochs, training.batch_size
        recipe = RECIPES[backbone.method](scale)
        images = scale.source_size if recipe.on_source else scale.train_sizes[backbone.dataset][0]
        if recipe.replay:
            images += round(scale.replay_fraction * scale.source_size)
        return images, recipe.training.epochs, recipe.training.batch_size

    def _evaluation_size(self, measurement: Measurement) -> tuple[int, int]:
        """(training images, images that few-shot finetuning and FixMatch train on over all trials and epochs)."""
        settings, trials = self.scale.evaluation, self.config.trials
        images, classes = self.scale.train_sizes[measurement.dataset]
        labelled = sum(measurement.shots) * classes * settings.fewshot_epochs
        unlabelled = len(measurement.semi_shots) * images * settings.semi_epochs
        return images, trials * (labelled + unlabelled)

    def _supervised(self) -> Any:
        if self.scale.supervised is None:
            raise ValueError(
                "weights.supervised_bit_resnet50 and weights.supervised_bit_resnet101 are needed for Tables 3 and 4: "
                "download BiT-S-R50x1.npz and BiT-S-R101x1.npz of the Big Transfer release and name them, or leave these "
                "tables out of tables"
            )
        return self.scale.supervised

    def check(self) -> None:
        """Refuse what cannot work before anything runs.

        Raises:
            ValueError: data or weights that are missing, where they go and how to get them.
        """
        config, scale = self.config, self.scale
        for backbone in self.backbones:
            if backbone.method == "sup_S" and self._trained_here(backbone):
                self._supervised()
            given = self._checkpoint(backbone)
            if not self._trained_here(backbone) and not Path(given).exists():
                raise ValueError(
                    f"weights.{backbone.pretraining}_{backbone.network}={given!r} does not exist; name a checkpoint"
                )
        names = sorted({measurement.dataset for measurement in self.measurements})
        if config.data is None and scale.write_data is None:
            raise ValueError(
                f"data is missing; name the folder that holds {', '.join(f'{LAYOUTS[name].folder}/' for name in names)} "
                f"as published, and {scale.source}/"
            )
        if config.data is not None:
            for name in names:
                LAYOUTS[name].locate(Path(config.data))
            source = Path(config.source or Path(config.data) / scale.source)
            if not source.is_dir():
                raise ValueError(
                    f"source={str(source)!r} is no folder; name the source set's class folders or its .tar shards"
                )

    def run(self) -> int:
        """Do this task's share of the stage; returns the number of parts that failed, whose reasons are printed."""
        self.check()
        if self.config.stage != "tables":
            self._run_backbones()
        if self.config.stage in ("all", "tables") and self.config.tasks == 1:
            self.write_tables()
        for name, reason in self.failures.items():
            print(f"failed: {name}: {reason}", file=sys.stderr)
        return len(self.failures)

    def _mine(self, items: Sequence[Any]) -> list[Any]:
        return [item for index, item in enumerate(items) if index % self.config.tasks == self.config.task]

    def _run_backbones(self) -> None:
        root, source = self._locate()
        pretrained = [b for b in self.backbones if b.method in grid.PRETRAINED and self._trained_here(b)]
        if self.config.stage == "pretrain":
            pretrained = self._mine(pretrained)
        elif self.config.tasks > 1 and not all(map(self._done, pretrained)):
            raise ValueError(
                f"tasks={self.config.tasks}: the pretrained backbones have to exist before the tasks share the rest; run "
                "stage=pretrain first, or name checkpoints by weights"
            )
        for backbone in pretrained:
            self._attempt(backbone.name, lambda b=backbone: self._pretrain(b, source))
        if self.config.stage == "pretrain":
            return
        datasets = {name: self._prepare(name, root) for name in sorted({m.dataset for m in self.measurements})}
        # One share is a backbone with all of its evaluations, so that no task waits for another.
        for number, backbone in enumerate(mine := self._mine(self.backbones), 1):
            mark = f"[{number}/{len(mine)}] {backbone.name}"
            if backbone.method not in grid.PRETRAINED:
                print(f"{mark}: training", flush=True)
                target = datasets[backbone.dataset].train
                self._attempt(backbone.name, lambda b=backbone, t=target: self._finetune(b, t, source))
            if backbone.name in self.failures or (self._trained_here(backbone) and not self._done(backbone)):
                continue
            for measurement in self.measurements:
                if measurement.backbone == backbone:
                    print(f"{mark}: evaluation on {measurement.dataset}", flush=True)
                    place = self._evaluation_folder(measurement)
                    self._attempt(
                        f"{backbone.name} on {measurement.dataset}",
                        lambda m=measurement, p=place: self._measure(m, p, datasets[m.dataset], source),
                    )

    def _attempt(self, name: str, work: Any) -> None:
        """A part that fails leaves the others to go on; what depends on it is left out."""
        try:
            work()
        except (ValueError, NonFiniteLossError, CheckpointError, LostRankError) as error:
            self.failures[name] = " ".join(str(error).split())
            print(f"{name}: {self.failures[name]}", file=sys.stderr, flush=True)

    def _locate(self) -> tuple[Path, str]:
        """(data root, source folder); a source in tar shards is unpacked, as far as it is needed."""
        config, scale = self.config, self.scale
        if config.data is not None:
            root, source = Path(config.data), config.source or str(Path(config.data) / scale.source)
        else:
            assert scale.write_data is not None  # checked before
            root = self.out / "data"
            source = scale.write_data(root)
        if not any(Path(source).glob("*.tar")):
            return root, source
        needs_all = any(b.method in grid.PRETRAINED and self._trained_here(b) for b in self.backbones)
        fraction = 1.0 if needs_all else scale.replay_fraction
        if not needs_all:  # the drawn share is all that is unpacked
            self.scale = dataclasses.replace(scale, replay_fraction=1.0)
        return root, extract_tar_sample(source, self.out / "source", fraction=fraction, seed=0)

    def _prepare(self, name: str, root: Path) -> PreparedDataset:
        size, classes = self.scale.train_sizes[name]
        return prepare_dataset(
            name,
            root,
            self.out / "datasets",
            train_size=size,
            num_classes=classes,
            caltech_per_class=self.scale.caltech_per_class,
        )

    def _pretrain(self, backbone: Backbone, source: str) -> None:
        if backbone.method != "sup_S":
            self._finetune(backbone, source, source)
            return
        if self._done(backbone):
            return
        print(f"{backbone.name}: supervised training on the source", flush=True)
        training = self._supervised()
        train_supervised(
            source,
            self._folder(backbone),
            arch=self.scale.archs[backbone.pretraining, backbone.network],
            stem=self.scale.stem,
            augment=self.scale.augment,
            epochs=training.epochs,
            lr=training.lr,
            batch_size=training.batch_size,
            # Tables 3 and 4 may share a network at the tiny scale; their weights differ all the same.
            seed=len(backbone.network),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )

    def _finetune(self, backbone: Backbone, target: str, source: str) -> None:
        """Train one backbone, or go on with it, unless it is finished."""
        folder = self._folder(backbone)
        config = train_config(
            backbone,
            self.scale,
            target=target,
            source=source,
            init=self._checkpoint(backbone.pretrained),
            out=str(folder),
        )
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, loader=self.config.loader))
        _check_same(folder, config)
        if self._done(backbone):
            return
        if self.config.processes == 1:
            result = train(config)
            if result.interrupted:
                raise SystemExit(f"stopped by {result.interrupted}; the same command goes on")
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(_plain(config), sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={self.config.processes}", "-m", "fastuft.cli", "pretrain", "--config", str(file)]
        if subprocess.run(command, check=False).returncode or not self._done(backbone):
            raise ValueError(f"training ended early in {self.config.processes} processes; the same command goes on")

    def _measure(self, measurement: Measurement, place: Path, dataset: PreparedDataset, source: str) -> None:
        """Evaluate one backbone on one data set, unless that is there already."""
        config = self.config
        wanted = dataclasses.replace(
            self.scale.evaluation,
            checkpoint=self._checkpoint(measurement.backbone),
            train=dataset.train,
            test=dataset.test,
            source=(config.forgetting or source) if measurement.source else None,
            out=str(place),
            shots=list(measurement.shots),
            semi_shots=list(measurement.semi_shots),
            trials=config.trials,
            tsne_points=self.scale.evaluation.tsne_points if measurement.tsne else 0,
            cache=str(self.out / "features"),
            seed=measurement.seed,
            loader=config.loader,
        )
        stored = _read_json(place / "eval.json").get("config", {})
        wanted = _grown(wanted, stored)
        if _plain(wanted) == stored:
            return
        backbone = measurement.backbone
        arch = self.scale.archs[backbone.pretraining, backbone.network]
        result = evaluate_backbone(load_backbone(wanted.checkpoint, arch, self.scale.stem), wanted)
        write_evaluation(place, result)

    def write_tables(self) -> None:
        """results.jsonl, the tables beside the paper's, and Figure 1, from the evaluations that are there."""
        rows: list[dict[str, Any]] = []
        for key in self.cells:
            measured = {}
            dataset = ""
            for seed in range(self.config.seeds):
                backbone, dataset = grid.cell_backbone(key, seed)
                folder = self._evaluation_folder(Measurement(backbone, dataset, seed))
                if (folder / "eval.json").exists():
                    measured[seed] = (_read_json(folder / "eval.json"), str(self._folder(backbone)))
            rows += grid.result_rows(key, measured, LAYOUTS[dataset].metric)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        notes = [f"Scale: {self.config.scale}; {self.config.trials} trials a figure."]
        if self.scale.write_data is not None:
            notes.append(
                "These are small networks on embedded images: the figures show that the grid runs, and are not "
                "comparable with the paper's, which are printed beside them."
            )
        if rows:
            everything = set(self.config.datasets) == set(DATASETS)
            write_comparison(self.out, self.out / RESULTS, notes=notes, missing=everything)
        if self.config.figure:
            self._write_figure(notes)

    def _write_figure(self, notes: Sequence[str]) -> None:
        runs = []
        for title, method in grid.FIGURE_1.items():
            backbone = grid.figure_backbone(method)
            place = self._evaluation_folder(Measurement(backbone, grid.FIGURE_1_TARGET, 0))
            if (place / "eval_arrays.npz").exists():
                runs.append(load_run(title, [place, self._folder(backbone)]))
        if runs:
            write_report(self.out / "figure1.html", runs, title="Figure 1: t-SNE of the target's features", notes=notes)


def _given(config: ReproduceConfig, backbone: Backbone) -> str | None:
    """The checkpoint that was named for a pretrained backbone."""
    return getattr(config.weights, f"{backbone.pretraining}_{backbone.network}")


def _plain(config: TrainConfig | EvalConfig) -> dict[str, Any]:
    """A configuration as its file reads: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _check_same(folder: Path, config: TrainConfig) -> None:
    """Refuse to mix runs of different settings in one output folder."""
    file = folder / "config.yaml"
    if not file.exists():
        return
    before, now = yaml.safe_load(file.read_text(encoding="utf-8")), _plain(config)
    changed = [name for name in now if name not in _NEUTRAL and before.get(name) != now[name]]
    if changed:
        raise ValueError(
            f"{folder} holds a run with another {', '.join(changed)}; choose another out, or remove that folder"
        )


def _grown(wanted: EvalConfig, stored: dict[str, Any]) -> EvalConfig:
    """What is wanted together with what was measured before, where the two go together."""
    same = {k: v for k, v in _plain(wanted).items() if k not in _GROWING}
    if not stored or any(stored.get(name) != value for name, value in same.items()):
        return wanted
    return dataclasses.replace(
        wanted,
        shots=sorted({*wanted.shots, *stored["shots"]}),
        semi_shots=sorted({*wanted.semi_shots, *stored["semi_shots"]}),
        tsne_points=max(wanted.tsne_points, stored["tsne_points"]),
        source=wanted.source or stored["source"],
    )


def reproduce(config: ReproduceConfig, scale: Scale | None = None) -> int:
    """Print the plan, or run this task's share of it and write the tables.

    Args:
        config: what to reproduce, and where.
        scale: sizes; by default those that ``config.scale`` names.

    Returns:
        The number of parts that failed.
    """
    work = Grid(config, scale)
    if config.dry_run:
        print(work.plan().show("text"))
        return 0
    began = time.perf_counter()
    failed = work.run()
    comparison = work.out / "comparison.txt"
    if config.stage in ("all", "tables") and config.tasks == 1 and comparison.exists():
        print(comparison.read_text(encoding="utf-8"))
        print(f"page:   {work.out / 'comparison.html'}")
        print(f"figure: {work.out / 'figure1.html'}")
    print(f"time:   {time.perf_counter() - began:.0f} s")
    return failed
