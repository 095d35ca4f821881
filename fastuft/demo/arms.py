"""The demo's arms: pretrain on glyphs, finetune on digits, evaluate, and set them side by side.

Every arm is a plain :class:`fastuft.config.TrainConfig` written into its run folder, so any of them can be repeated with
``fastuft finetune --config RUN/config.yaml``.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastuft.config import DataConfig, EvalConfig, MethodConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from fastuft.data import SMALL_IMAGES, labelled_folder
from fastuft.demo.images import DemoFolders, write_demo_images
from fastuft.evaluate import clustering_accuracy, evaluate_backbone, retrieval_accuracy, write_evaluation
from fastuft.model import load_backbone
from fastuft.report import accuracy_table, load_run, table, write_report
from fastuft.trainer import train

MODEL = ModelConfig(arch="resnet_tiny", stem="small", head_dim=64, bn="plain")
METHOD = MethodConfig(queue_size=2048, key_momentum=0.99, mix="none")
RUNTIME = RuntimeConfig(tensorboard=False)
BATCH = 128
PRETRAIN_LR, FINETUNE_LR = 0.12, 0.06
# The paper's 3.0 for the FC suits ResNet-50. For this network it was chosen among 3, 1, 0.3 and 0.1 by the pretrained
# backbone's accuracy on held-out training digits; test digits played no part.
FEWSHOT_LR = 1.0

PRETRAINED, RAW_PIXELS = "pretrained", "raw pixels"
# (source replayed, mixing, steps matched to the replay arm's)
ARMS = {
    "naive": (False, False, False),
    "naive, same steps as + SDR": (False, False, True),
    "+ SDR": (True, False, False),
    "+ Mix without SDR": (False, True, False),
    "+ SDR + Mix": (True, True, False),
}


def _folder_name(arm: str) -> str:
    return "_".join(re.findall(r"\w+", arm.replace("+", " plus ")))


def pretrain_config(folders: DemoFolders, out: Path, seed: int, epochs: int) -> TrainConfig:
    """MoCoV2 pretraining of the small network on the glyphs."""
    return TrainConfig(
        target=folders.source,
        out=str(out),
        seed=seed,
        model=MODEL,
        method=dataclasses.replace(METHOD, queue_prefill=False),
        augment=SMALL_IMAGES,
        data=DataConfig(batch_size=BATCH),
        optim=OptimConfig(lr=PRETRAIN_LR, epochs=epochs),
        runtime=RUNTIME,
        resume="auto",
    )


def arm_config(arm: str, folders: DemoFolders, init: Path, out: Path, seed: int, epochs: int) -> TrainConfig:
    """Finetuning on the digits from the pretrained run."""
    replay, mix, matched = ARMS[arm]
    if matched:
        # Passes over the target alone are shorter than passes over the union; more of them take as many steps.
        targets = len(labelled_folder(folders.train)[0])
        sources = round(DataConfig().replay_fraction * len(labelled_folder(folders.source)[0]))
        epochs = round(epochs * ((targets + sources) // BATCH) / (targets // BATCH))
    return TrainConfig(
        target=folders.train,
        source=folders.source if replay else None,
        init=str(init),
        out=str(out),
        seed=seed,
        model=MODEL,
        method=dataclasses.replace(METHOD, mix="cutmix" if mix else "none"),
        augment=SMALL_IMAGES,
        data=DataConfig(batch_size=BATCH),
        optim=OptimConfig(lr=FINETUNE_LR, epochs=epochs),
        runtime=RUNTIME,
        resume="auto",
    )


def evaluate_run(
    run: Path, before: Path, folders: DemoFolders, cache: Path, seed: int, shots: Sequence[int], trials: int
) -> None:
    """Evaluate a run's backbone against the pretrained one; figures go into the run folder, once."""
    if (run / "eval.json").exists():
        return
    config = EvalConfig(
        checkpoint=str(run),
        before=str(before),
        train=folders.train,
        test=folders.test,
        source=folders.source,
        out=str(run),
        size=SMALL_IMAGES.size,
        resize=SMALL_IMAGES.size,
        shots=list(shots),
        trials=trials,
        fewshot_lr=FEWSHOT_LR,
        fewshot_crop_scale=(1.0, 1.0),
        fewshot_flip_p=0.0,
        kmeans_restarts=3,
        cache=str(cache),  # the pretrained backbone's features serve every arm
        seed=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate_backbone(load_backbone(run), config, load_backbone(before) if run != before else None)
    write_evaluation(run, result)


def evaluate_pixels(out: Path, folders: DemoFolders, seed: int) -> None:
    """Figures of the raw pixels in a folder of their own, once."""
    if (out / "eval.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "eval.json").write_text(json.dumps(raw_pixels(folders, seed)))


def raw_pixels(folders: DemoFolders, seed: int) -> dict[str, float]:
    """Retrieval and clustering of the images themselves: what a representation has to beat."""

    def pixels(folder: str) -> tuple[np.ndarray, list[int]]:
        paths, labels, _ = labelled_folder(folder)
        rows = [np.asarray(Image.open(path).convert("L"), np.float32).ravel() / 255 for path in paths]
        return np.stack(rows), labels

    (train_x, train_y), (test_x, test_y) = pixels(folders.train), pixels(folders.test)
    return {
        "retrieval": retrieval_accuracy(train_x, train_y, test_x, test_y),
        "clustering": clustering_accuracy(train_x, train_y, restarts=3, seed=seed),
    }


def run_demo(
    out: str,
    *,
    seeds: int = 1,
    first_seed: int = 0,
    pretrain_epochs: int = 20,
    finetune_epochs: int = 40,
    shots: Sequence[int] = (1, 2, 4, 8),
    trials: int = 1,
    num_glyphs: int = 8000,
) -> Path:
    """Write the images, train and evaluate every arm for every seed, print the table, write it and the report.

    A run that is finished in ``out`` is kept and one that was broken off goes on, so further seeds may follow later. All
    seeds share the images; each has its own pretraining, from which all of its arms start. ``table.md`` holds the
    accuracies as Markdown.

    Args:
        out: folder for everything.
        seeds: repetitions.
        first_seed: seed of the first.
        pretrain_epochs: epochs on the source.
        finetune_epochs: epochs of each arm.
        shots: labelled images a class of the few-shot runs.
        trials: draws a few-shot figure.
        num_glyphs: source images.

    Returns:
        Path of the report.

    Raises:
        ValueError: ``out`` holds a demo with other settings.
    """
    started = time.perf_counter()
    root = Path(out)
    _same_settings(
        root,
        pretrain_epochs=pretrain_epochs,
        finetune_epochs=finetune_epochs,
        shots=list(shots),
        trials=trials,
        num_glyphs=num_glyphs,
    )
    folders = write_demo_images(root / "images", num_glyphs=num_glyphs)
    runs: list[tuple[str, Path]] = []
    for seed in range(first_seed, first_seed + seeds):
        place = root / f"seed{seed}"
        pretrained = place / PRETRAINED
        print(f"[seed {seed}] pretraining on {num_glyphs} glyphs", flush=True)
        _train(pretrain_config(folders, pretrained, seed, pretrain_epochs))
        evaluate_pixels(place / "raw_pixels", folders, seed)
        evaluate_run(pretrained, pretrained, folders, root / "features", seed, shots, trials)
        runs += [(RAW_PIXELS, place / "raw_pixels"), (PRETRAINED, pretrained)]
        for arm in ARMS:
            run = place / _folder_name(arm)
            print(f"[seed {seed}] {arm}", flush=True)
            _train(arm_config(arm, folders, pretrained, run, seed, finetune_epochs))
            evaluate_run(run, pretrained, folders, root / "features", seed, shots, trials)
            runs.append((arm, run))
    print()
    print(table(runs))
    accuracies = accuracy_table([load_run(*run) for run in runs])
    assert accuracies is not None  # the raw pixels have figures
    (root / "table.md").write_text(accuracies.markdown(), encoding="utf-8")
    report = root / "report.html"
    notes = [
        f"Source: {num_glyphs} rendered glyphs, with which a small network is pretrained. Target: scikit-learn's handwritten "
        "digits, 500 of them unlabelled for training and as gallery, 1,297 for test. SDR replays 10 % of the glyphs, Mix "
        "trains on CutMix queries. Labels serve evaluation alone.",
        f"Seeds {', '.join(map(str, range(first_seed, first_seed + seeds)))}; every figure is as it came.",
    ]
    write_report(report, runs, title="fastuft demo: from glyphs to handwritten digits", notes=notes)
    print(f"report:     {report}")
    print(f"table:      {root / 'table.md'}")
    print(f"checkpoint: {root / f'seed{first_seed}' / _folder_name('+ SDR + Mix') / 'backbone.safetensors'}")
    print(f"time:       {time.perf_counter() - started:.0f} s")
    return report


def _same_settings(root: Path, **settings: Any) -> None:
    """Keep what the figures of a folder depend on, and refuse to mix them with those of other settings."""
    kept = root / "demo.json"
    before = json.loads(kept.read_text()) if kept.exists() else settings
    changed = [f"{name} {before.get(name)!r}" for name, value in settings.items() if before.get(name) != value]
    if changed:
        raise ValueError(
            f"out={str(root)!r} holds a demo with {', '.join(changed)}; go on with the same settings, or choose another out"
        )
    root.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(settings))


def _train(config: TrainConfig) -> None:
    with warnings.catch_warnings():
        # The queue is larger than this small training set on purpose; a user's own run is told.
        warnings.filterwarnings("ignore", message="method.queue_size")
        result = train(config)
    if result.interrupted:
        raise SystemExit(f"stopped by {result.interrupted}; run the demo again to go on")
