"""Compares settings of finetuning by labels, on any folders: retrieval, clustering and few-shot accuracy over the steps.

    python bench/sweep.py bench/sweeps/photos.yaml --init start.safetensors --train photos/train --test photos/test \
        --source imagenet/ --out runs/sweep --only auto naive --seeds 0 1 2

A sweep is a YAML file of ``common`` options and named ``settings`` that override them, both options of ``fastuft.finetune``. A
setting may omit the source (``source: false``), take a share of the images of every class (``images: 0.5``) or measure few-shot
accuracy at every look, not only the last (``shots_at: every``). ``fewshot`` and ``resize`` are options of the accuracies. Each
run has its own folder. Few-shot accuracies of class means, which need no training, are measured at every look. Few-shot
finetuning has one learning rate for all backbones, so the tables mark accuracies at which it did not converge with a question
mark. Finished runs are kept and interrupted ones resume, so repeating the command completes a sweep. It
writes ``sweep.json``, with label-free measures and accuracies of every look, and ``sweep.md``. ``bench/verdict.py``
reads the first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import yaml

import fastuft
from fastuft.config import FewShotConfig
from fastuft.data import EvalStream, Loading, labeled_folder
from fastuft.evaluate import clustering_accuracy, extract_features, fewshot, prototype_accuracy, retrieval_accuracy
from fastuft.model import Backbone, load_backbone
from fastuft.runfolder import RunFolder, write_json
from fastuft.trainer import StartAverage

START = "start"


def main() -> None:
    """Run the missing runs of a sweep, then write its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="YAML file of common options and settings")
    parser.add_argument("--init", required=True, help="checkpoint to start from")
    parser.add_argument("--train", required=True, help="target images in class folders; finetuned on without labels")
    parser.add_argument("--test", required=True, help="test images of the same classes")
    parser.add_argument("--source", required=True, help="source images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and tables")
    parser.add_argument("--only", nargs="*", help="names of settings; all without")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--shots", nargs="*", type=int, default=[1, 2, 4], help="labeled images per class")
    parser.add_argument("--trials", type=int, default=1, help="draws per few-shot figure")
    asked = parser.parse_args()
    sweep = yaml.safe_load(asked.sweep.read_text(encoding="utf-8"))
    settings = {name: merged(sweep.get("common", {}), own or {}) for name, own in sweep["settings"].items()}
    names = asked.only or list(settings)
    unknown = [name for name in names if name not in settings]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} not among {', '.join(settings)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, seed in [(START, 0), *((name, seed) for seed in asked.seeds for name in names)]:
        folder = asked.out / f"{name}-{seed}"
        if not (folder / "result.json").exists():
            print(f"{name}, seed {seed}", flush=True)
            folder.mkdir(exist_ok=True)
            started = start(asked, settings[names[0]]) if name == START else run(asked, settings[name], folder, seed)
            write_json(folder / "result.json", {"setting": name, "seed": seed, **started})
        write_tables(asked.out)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The nested options of ``below``, overridden by those of ``above``."""
    both = dict(below)
    for name, value in above.items():
        old = both.get(name)
        both[name] = merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return both


def start(asked: argparse.Namespace, options: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracies of the checkpoint that all runs start from."""
    model = options.get("model", {})
    backbone = load_backbone(asked.init, model.get("arch"), model.get("stem"))
    return {"looks": [{"step": 0, "labels": labels_of(backbone, asked, options, asked.shots)}], "seconds": 0.0}


def run(asked: argparse.Namespace, given: Mapping[str, Any], folder: Path, seed: int) -> dict[str, Any]:
    """One finetuning, and the accuracies at each of its looks."""
    options = dict(given)
    source, share = options.pop("source", True), options.pop("images", 1.0)
    every = options.pop("shots_at", "last") == "every"
    for name in ("fewshot", "resize"):  # options of the accuracies
        options.pop(name, None)
    looks = options.get("verdict", {}).get("looks", 5)
    # Where the verdict selects, every look has a checkpoint; all of them are kept until the accuracies are measured.
    kept = {"select": "judged", "runtime": {"save_every": 10**9, "keep_last": looks + 1, "tensorboard": False}}
    began = time.monotonic()
    done = fastuft.finetune(
        target=listed(asked, share),
        source=asked.source if source else None,
        init=asked.init,
        out=folder / "run",
        seed=seed,
        resume="auto",
        **merged(options, kept),
    )
    if done.interrupted:
        raise SystemExit(f"stopped by {done.interrupted}; the same command goes on")
    seconds = time.monotonic() - began
    rows = [row for row in done.history() if row["kind"] == "look"]
    files = RunFolder(folder / "run")
    summary = files.read_summary()
    average = StartAverage(summary["verdict"]["start_share"], load_backbone(files.start_file).state_dict())
    for row in rows[1:]:
        backbone = average.of(load_backbone(files.checkpoints.path(row["step"])))
        last = row is rows[-1]
        row["labels"] = labels_of(backbone, asked, given, asked.shots if last or every else [])
    shutil.rmtree(files.checkpoints.folder)
    keys = ("verdict", "recipe")
    return {"looks": rows, "seconds": seconds, "options": dict(given), **{key: summary[key] for key in keys}}


def listed(asked: argparse.Namespace, share: float) -> str:
    """The target, or a list of an even share of every class's images."""
    if share >= 1:
        return str(asked.train)
    paths, labels, _ = labeled_folder(asked.train)
    classes: dict[int, list[str]] = {}
    for path, label in zip(paths, labels, strict=True):
        classes.setdefault(label, []).append(path)
    chosen = [path for own in classes.values() for path in own[:: round(1 / share)]]
    file = asked.out / f"target_{share:g}.txt"
    file.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return str(file)


def labels_of(
    backbone: Backbone, asked: argparse.Namespace, options: Mapping[str, Any], shots: list[int]
) -> dict[str, Any]:
    """Retrieval, clustering and, with shots, few-shot accuracy of a backbone, in percent."""
    size = options.get("augment", {}).get("size", backbone.input_size)
    resize, batch = options.get("resize", round(size * 256 / 224)), 64
    folders = {name: labeled_folder(getattr(asked, name)) for name in ("train", "test")}

    def stream(name: str) -> EvalStream:
        paths, labels, _ = folders[name]
        loading = Loading(backbone.mean, backbone.std, torch.device("cpu"))
        return EvalStream(paths, labels, loading=loading, size=size, resize=resize, batch_size=batch)

    features = {}
    for name in folders:
        with closing(stream(name)) as images:
            features[name] = extract_features(backbone, images)[0]
    (paths, train, classes), (_, test, _) = folders["train"], folders["test"]
    both = features["train"], train, features["test"], test
    figures: dict[str, Any] = {
        "retrieval": 100 * retrieval_accuracy(*both),
        "clustering": 100 * statistics.fmean(clustering_accuracy(features["train"], train, seed=s) for s in range(3)),
        "class_means": {str(k): 100 * statistics.fmean(prototype_accuracy(*both, k)) for k in asked.shots},
    }
    if shots:
        with closing(stream("test")) as images:
            found = fewshot(
                backbone,
                paths,
                train,
                images,
                test,
                config=FewShotConfig(**{**options.get("fewshot", {}), "shots": shots}),
                size=size,
                resize=resize,
                trials=asked.trials,
                classes=classes,
            )
        figures["fewshot"] = {str(k): 100 * statistics.fmean(values) for k, values in found.mean_class.items()}
        figures["unsettled"] = [str(k) for k in found.unsettled]
    return figures


def results(out: Path) -> Iterator[dict[str, Any]]:
    """The finished runs below ``out``, the start first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*/result.json"))]
    yield from sorted(found, key=lambda result: (result["setting"] != START, result["setting"], result["seed"]))


def write_tables(out: Path) -> None:
    """Write ``sweep.json`` and ``sweep.md``: the last look of every run, and all looks."""
    runs = list(results(out))
    start_labels = runs[0]["looks"][0]["labels"]
    for entry in runs[1:]:
        entry["looks"][0]["labels"] = start_labels
    write_json(out / "sweep.json", {"runs": runs})
    shots = sorted(start_labels.get("fewshot", {}), key=int)
    means = sorted(start_labels.get("class_means", {}), key=int)
    kinds = [*(f"{k}-shot means" for k in means), *(f"{k}-shot" for k in shots)]
    head = ["setting", "seed", "step", "retrieval", "clustering", *kinds, "minutes", "verdict"]
    ends = [[*cells(entry, entry["looks"][-1], means, shots), *fate(entry)] for entry in runs]
    measures = ("effective_rank", "lidar", "uniformity", "alignment", "view_agreement", "neighbors_kept", "source_cka")
    looks = [
        [*cells(entry, look, means, shots), *(number(look.get(name), 3) for name in measures)]
        for entry in runs[1:]
        for look in entry["looks"]
    ]
    words = [*head[:-2], *(name.replace("_", " ") for name in measures)]
    parts = ["## At the end", table(head, ends), "## Over the steps", table(words, looks)]
    (out / "sweep.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def cells(entry: Mapping[str, Any], look: Mapping[str, Any], means: list[str], shots: list[str]) -> list[str]:
    """Setting, seed, step and accuracies of one look."""
    labels = look.get("labels") or {}
    accuracies = [labels.get("retrieval"), labels.get("clustering")]
    accuracies += [labels.get("class_means", {}).get(k) for k in means]
    doubted = labels.get("unsettled", [])
    finetuned = [number(labels.get("fewshot", {}).get(k), 1) + "?" * (k in doubted) for k in shots]
    return [entry["setting"], str(entry["seed"]), str(look["step"]), *(number(a, 1) for a in accuracies), *finetuned]


def fate(entry: Mapping[str, Any]) -> list[str]:
    """Duration of a run in minutes, and its verdict."""
    verdict = entry.get("verdict")
    if not verdict:
        return ["", ""]
    return [f"{entry['seconds'] / 60:.1f}", f"{verdict['outcome']} (step {verdict['step']})"]


def number(value: float | None, digits: int) -> str:
    """A figure as text; empty if there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


if __name__ == "__main__":
    main()
