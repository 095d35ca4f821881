"""From the grid to figures: plan, train what is missing, evaluate, and set the results beside the paper's.

Layout of the output folder::

    runs/<backbone>/                   a run folder each
    runs/<backbone>/eval-<data set>/   its evaluation
    datasets/, source/, features/      class folders of the data sets, the drawn source share, cached features
    locks/                             which process works on what
    results.jsonl, comparison.*        every trial's figure, and the tables beside the paper's
    figure1.html                       the maps of Figure 1

Whatever is finished is kept, so the same command goes on after a stop, and the tasks of a job array work side by side.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from fastuft.config import DATASETS, EvalConfig, ReproduceConfig, TrainConfig
from fastuft.evaluate import evaluate_backbone, write_evaluation
from fastuft.evaluate.features import weights_hash
from fastuft.model import BACKBONE_FILE, load_backbone
from fastuft.report import load_run, write_comparison, write_report
from fastuft.report.tables import Table
from fastuft.reproduce import grid
from fastuft.reproduce.claims import claim
from fastuft.reproduce.datasets import LAYOUTS, PreparedDataset, prepare_dataset
from fastuft.reproduce.grid import Backbone, Measurement
from fastuft.reproduce.plan import plan_table
from fastuft.reproduce.recipes import SCALES, Scale, train_config
from fastuft.reproduce.shards import extract_tar_sample
from fastuft.reproduce.supervised import train_supervised
from fastuft.trainer import EXIT_PREEMPTED, CheckpointError, LostRankError, NonFiniteLossError, train

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
        """Whether a training is finished; one that was stopped has a backbone too, that of its last step."""
        folder = self._folder(backbone)
        # Supervised training writes its backbone once, at the end; the others write a summary.
        finished = backbone.method == "sup_S" or _read_json(folder / "summary.json").get("finished", False)
        return finished and (folder / BACKBONE_FILE).exists()

    def plan(self) -> Table:
        """Every training and evaluation with its images and steps; the trainings' hours from the given rate only."""
        return plan_table(
            self.scale,
            [(backbone, self._done(backbone)) for backbone in self.backbones if self._planned(backbone)],
            [(m, (self._evaluation_folder(m) / "eval.json").exists()) for m in self.measurements],
            trials=self.config.trials,
            rate=self.config.rate,
        )

    def _planned(self, backbone: Backbone) -> bool:
        """Whether a backbone is trained here: neither named by weights nor asked for."""
        return self._trained_here(backbone) and (backbone.method != "sup_S" or self.scale.supervised is not None)

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
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "reproduce starts the processes of its trainings itself; start it once a machine with --processes N, "
                "without torchrun, or as tasks of a job array with --task and --tasks"
            )
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
            with claim(self.out, "tables", wait=True):
                self.write_tables()
        for name, reason in self.failures.items():
            print(f"failed: {name}: {reason}", file=sys.stderr)
        return len(self.failures)

    def _mine(self, items: Sequence[Any]) -> list[Any]:
        return [item for index, item in enumerate(items) if index % self.config.tasks == self.config.task]

    def _run_backbones(self) -> None:
        with claim(self.out, "data", wait=True):  # one process writes, the others find it written
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
            with claim(self.out, backbone.name, wait=True):  # all that follows starts from it
                self._attempt(backbone.name, lambda b=backbone: self._pretrain(b, source))
        if self.config.stage == "pretrain":
            return
        with claim(self.out, "data", wait=True):
            datasets = {name: self._prepare(name, root) for name in sorted({m.dataset for m in self.measurements})}
        # One share is a backbone with all of its evaluations, so that no task waits for another. A task that is through
        # with its own share takes what is left of the others'.
        mine = self._mine(self.backbones)
        order = [*mine, *(backbone for backbone in self.backbones if backbone not in mine)]
        for number, backbone in enumerate(order, 1):
            mark = f"[{number}/{len(order)}] {backbone.name}"
            with claim(self.out, backbone.name) as alone:
                if alone:
                    self._run_backbone(backbone, mark, datasets, source)
                else:
                    print(f"{mark}: in the hands of another process", flush=True)

    def _run_backbone(
        self, backbone: Backbone, mark: str, datasets: Mapping[str, PreparedDataset], source: str
    ) -> None:
        """Train one backbone and evaluate it on all of its data sets, as far as that is not done."""
        if backbone.method not in grid.PRETRAINED:
            target = datasets[backbone.dataset].train
            self._attempt(backbone.name, lambda: self._finetune(backbone, target, source, mark))
        if backbone.name in self.failures or (self._trained_here(backbone) and not self._done(backbone)):
            return
        for measurement in self.measurements:
            if measurement.backbone == backbone:
                self._attempt(
                    f"{backbone.name} on {measurement.dataset}",
                    lambda m=measurement: self._measure(m, datasets[m.dataset], source, mark),
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
        place = self.out / "source" / ("all" if needs_all else "replayed")
        return root, extract_tar_sample(source, place, fraction=fraction, seed=0)

    def _prepare(self, name: str, root: Path) -> PreparedDataset:
        return prepare_dataset(
            name,
            root,
            self.out / "datasets",
            sizes=self.scale.sizes[name],
            caltech_per_class=self.scale.caltech_per_class,
        )

    def _pretrain(self, backbone: Backbone, source: str) -> None:
        if backbone.method != "sup_S":
            self._finetune(backbone, source, source, backbone.name)
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

    def _finetune(self, backbone: Backbone, target: str, source: str, mark: str) -> None:
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
        print(f"{mark}: training", flush=True)
        alone = self.config.processes == 1
        interrupted = train(config).interrupted if alone else self._train_in_processes(config)
        if interrupted:
            print(f"stopped by {interrupted}; the same command goes on", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_PREEMPTED)

    def _train_in_processes(self, config: TrainConfig) -> str | None:
        """Train in several processes of this machine; the signal that stopped them, or None."""
        folder, summary = Path(config.out), Path(config.out) / "summary.json"
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(_plain(config), sort_keys=False), encoding="utf-8")
        before = summary.stat().st_mtime_ns if summary.exists() else 0
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={self.config.processes}", "-m", "fastuft.cli", "pretrain", "--config", str(file)]
        failed = _run_stoppable(command) != 0
        fresh = summary.exists() and summary.stat().st_mtime_ns != before  # an older one tells of an earlier stop
        result = _read_json(summary) if fresh else {}
        if result.get("interrupted"):
            return str(result["interrupted"])
        if failed or not result.get("finished"):
            raise ValueError(f"training ended early in {self.config.processes} processes; the same command goes on")
        return None

    def _measure(self, measurement: Measurement, dataset: PreparedDataset, source: str, mark: str) -> None:
        """Evaluate one backbone on one data set, unless that is there already for these weights."""
        config, place = self.config, self._evaluation_folder(measurement)
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
        backbone = measurement.backbone
        arch = self.scale.archs[backbone.pretraining, backbone.network]
        loaded = load_backbone(wanted.checkpoint, arch, self.scale.stem)
        before = _read_json(place / "eval.json")
        if before.get("backbone", {}).get("hash") == weights_hash(loaded):
            wanted = _grown(wanted, before["config"])
            if _plain(wanted) == before["config"]:
                return
        print(f"{mark}: evaluation on {measurement.dataset}", flush=True)
        write_evaluation(place, evaluate_backbone(loaded, wanted))

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


def _run_stoppable(command: list[str]) -> int:
    """Run a command; what asks this process to stop meanwhile (SIGTERM, SIGUSR1) is passed on to it as SIGTERM."""
    process: subprocess.Popen[bytes] | None = None
    asked = False

    def pass_on(*_: object) -> None:
        nonlocal asked
        asked = True
        if process is not None:
            process.terminate()

    main_thread = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    names = [name for name in ("SIGTERM", "SIGUSR1") if main_thread and hasattr(signal, name)]
    before = {getattr(signal, name): signal.signal(getattr(signal, name), pass_on) for name in names}
    try:
        process = subprocess.Popen(command)
        if asked:  # between the handlers and the start
            process.terminate()
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _given(config: ReproduceConfig, backbone: Backbone) -> str | None:
    """The checkpoint that was named for a pretrained backbone."""
    given: str | None = getattr(config.weights, f"{backbone.pretraining}_{backbone.network}")
    return given


def _plain(config: TrainConfig | EvalConfig) -> dict[str, Any]:
    """A configuration as its file reads: lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


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
    if any(stored.get(name) != value for name, value in same.items()):
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
        if config.rate:
            print(f"Hours of the trainings at {config.rate:g} images a second; no rate was measured for evaluations.")
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
