"""The whole evaluation of one backbone on folders of images, and the files it leaves for the report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastuft.atomic import write_whole
from fastuft.config import EvalConfig
from fastuft.data import EvalStream, Loading, labeled_folder, list_images, resolve_loader
from fastuft.evaluate.clustering import clustering_accuracy
from fastuft.evaluate.embedding import tsne
from fastuft.evaluate.features import autocast, cached_features, module_device, weights_hash
from fastuft.evaluate.images import decode, random_views, thumbnail_png
from fastuft.evaluate.inputs import quoted
from fastuft.evaluate.retrieval import nearest_neighbors, retrieval_accuracy
from fastuft.evaluate.semi import FixMatchResult, FixMatchSettings, fixmatch
from fastuft.evaluate.shots import FewShotResult, FewShotSettings, draw_shots, fewshot
from fastuft.evaluate.unlabeled import alignment_uniformity, drift, neighbor_overlap
from fastuft.model import Backbone
from fastuft.randomness import keyed_generator, keyed_seed

NEIGHBORS = 5
# Label-free measures look at no more images than this: their sampling error is then far below what matters.
SAMPLE = 2048
# Area range of the crops between which alignment is measured, whatever few-shot finetuning crops.
VIEW_SCALE = (0.4, 1.0)

NO_LABELS = (
    "No labels were given (train has no class sub-folders), so no accuracy is known: not retrieval, not clustering, "
    "not few-shot. The figures below say how the representation changed, not whether it became better. Looking at the "
    "neighbors before and after is the best check; a few labeled images a class would allow a real one."
)
NO_TEST = (
    "No labeled test set was given, so retrieval and few-shot accuracy on unseen images are not known. Clustering "
    "accuracy describes the training images themselves."
)
NO_BEFORE = (
    "No earlier checkpoint was given, so nothing is known about what changed: no drift, no neighbors kept or lost."
)
NO_SOURCE = "No source images were given, so forgetting of the source is not known."
NO_SOURCE_LABELS = (
    "The source has no class sub-folders, so forgetting as an accuracy is not known; drift of its features is."
)


@dataclass(frozen=True)
class Images:
    """One folder of images: labels and class names are empty when it has no class sub-folders."""

    paths: list[str]
    labels: np.ndarray
    classes: list[str]

    @property
    def labeled(self) -> bool:
        return bool(self.classes)


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate_backbone`.

    Args:
        metrics: JSON-able figures, as fractions; written as ``eval.json``.
        arrays: what the report draws (map, gallery, thumbnails); written as ``eval_arrays.npz``.
        draws: files of each few-shot draw, by trial and class; written as ``fewshot_draws.json``.
    """

    metrics: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    draws: dict[str, dict[str, list[str]]] = field(default_factory=dict)


def read_images(name: str, folder: str) -> Images:
    """The images of ``folder``: labeled when all of them lie in sub-folders, of which there are at least two."""
    root = Path(folder)
    if root.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in root.iterdir()):
        paths = list_images(folder)
        if all(Path(path).absolute().parent != root.absolute() for path in paths):
            found, labels, classes = labeled_folder(folder)
            if len(classes) < 2:
                raise ValueError(
                    f"{name}={folder!r} has one class sub-folder only ({quoted(classes)}); a labeled metric needs at "
                    f"least two. For a report without labels name the images' own folder"
                )
            return Images([str(path) for path in found], np.asarray(labels), list(classes))
        return Images([str(path) for path in paths], np.empty(0, np.int64), [])
    return Images([str(path) for path in list_images(folder)], np.empty(0, np.int64), [])


def _check_classes(train: Images, test: Images) -> None:
    if train.classes == test.classes:
        return
    lost, extra = (sorted(set(a.classes) - set(b.classes)) for a, b in ((train, test), (test, train)))
    raise ValueError(
        "train and test must have the same class sub-folders; "
        + "; ".join(f"only in {name}: {quoted(names)}" for name, names in (("train", lost), ("test", extra)) if names)
        + ". Rename or remove these folders"
    )


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for a single trial) and the trials themselves."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "trials": [float(v) for v in values]}


def _by_shots(result: FewShotResult, *figures: str) -> dict[str, Any]:
    """Spread over trials of the named figures, by K."""
    return {str(k): {name: _spread(getattr(result, name)[k]) for name in figures} for k in result.top1}


class _Evaluator:
    """Features and settings shared by the sections of one evaluation."""

    def __init__(self, config: EvalConfig) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda' needs a CUDA device, and none is available; use auto or cpu")
        cuda = config.device != "cpu" and torch.cuda.is_available()
        self.config = config
        self.device = torch.device("cuda" if cuda else "cpu")
        self.resize = config.resize or round(config.size * 256 / 224)
        self.timings: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def stream(self, backbone: Backbone, images: Images) -> Iterator[EvalStream]:
        config = self.config
        stream = EvalStream(
            images.paths,
            images.labels.tolist() if images.labeled else None,
            loading=Loading(backbone.mean, backbone.std, self.device, loader=config.loader),
            size=config.size,
            resize=self.resize,
            batch_size=config.batch_size,
        )
        try:
            yield stream
        finally:
            stream.close()

    def features(self, backbone: Backbone, images: Images) -> Tensor:
        config = self.config
        loader = resolve_loader(config.loader)
        settings = f"{config.size} {self.resize} {backbone.mean} {backbone.std} {loader} {self.device.type}"
        with self.timed("features"), self.stream(backbone, images) as stream:
            return cached_features(
                backbone,
                stream,
                images.paths,
                config.cache,
                settings=settings,
                device=self.device,
                precision=config.precision,
            )

    def clustering(self, features: Tensor, images: Images) -> dict[str, Any]:
        config = self.config
        with self.timed("clustering"):
            return _spread(
                [
                    clustering_accuracy(
                        features,
                        images.labels,
                        restarts=config.kmeans_restarts,
                        seed=keyed_seed(config.seed, "clustering", trial),
                        device=self.device,
                    )
                    for trial in range(config.trials)
                ]
            )

    def retrieval(self, gallery: Tensor, train: Images, queries: Tensor, test: Images) -> float:
        with self.timed("retrieval"):
            return retrieval_accuracy(gallery, train.labels, queries, test.labels, NEIGHBORS, device=self.device)

    def finetuning(self) -> FewShotSettings:
        config = self.config
        return FewShotSettings(
            epochs=config.fewshot_epochs,
            lr=config.fewshot_lr,
            backbone_lr=config.fewshot_backbone_lr,
            size=config.size,
            resize=self.resize,
            crop_scale=config.fewshot_crop_scale,
            flip_p=config.fewshot_flip_p,
            precision=config.precision,
        )

    def fewshot(self, backbone: Backbone, train: Images, test: Images) -> FewShotResult:
        config = self.config
        with self.timed("fewshot"), self.stream(backbone, test) as stream:
            return fewshot(
                backbone,
                train.paths,
                train.labels,
                stream,
                test.labels,
                shots=config.shots,
                trials=config.trials,
                seed=config.seed,
                classes=train.classes,
                settings=self.finetuning(),
            )

    def fixmatch(self, backbone: Backbone, train: Images, test: Images) -> FixMatchResult:
        config = self.config
        recipe = dataclasses.replace(self.finetuning(), epochs=config.semi_epochs, batch_size=config.semi_batch)
        with self.timed("fixmatch"), self.stream(backbone, test) as stream:
            return fixmatch(
                backbone,
                train.paths,
                train.labels,
                stream,
                test.labels,
                shots=config.semi_shots,
                trials=config.trials,
                seed=config.seed,
                classes=train.classes,
                settings=FixMatchSettings(recipe),
                loader=config.loader,
            )

    def sample(self, name: str, count: int, most: int) -> np.ndarray:
        """Sorted positions of ``most`` random items out of ``count``; the same for every backbone."""
        return np.sort(keyed_generator(self.config.seed, "sample", name).permutation(count)[:most])

    def two_views(self, backbone: Backbone, paths: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features of two random crops of each image."""
        generator = keyed_generator(self.config.seed, "views")
        pool = decode(paths, self.resize)
        views: list[list[Tensor]] = [[], []]
        with torch.no_grad():
            for start in range(0, len(pool), self.config.batch_size):
                images = [image.to(self.device) for image in pool[start : start + self.config.batch_size]]
                for found in views:
                    batch = random_views(
                        images,
                        self.config.size,
                        generator,
                        scale=VIEW_SCALE,
                        flip_p=self.config.fewshot_flip_p,
                        mean=backbone.mean,
                        std=backbone.std,
                    )
                    with autocast(self.device, self.config.precision):
                        found.append(backbone(batch).float().cpu())
        return torch.cat(views[0]), torch.cat(views[1])


def _label_free(
    run: _Evaluator, backbone: Backbone, before: Backbone | None, train: Images, features: list[Tensor]
) -> dict[str, Any]:
    """Alignment and uniformity of two views, and what changed since ``before``; features are (after, before)."""
    if len(train.paths) < 2:
        raise ValueError(f"train={run.config.train!r} has one image; an evaluation needs at least two")
    index = run.sample("unlabeled", len(train.paths), SAMPLE)
    few = [train.paths[i] for i in index[: SAMPLE // 4]]
    result: dict[str, Any] = {"images": len(index)}
    with run.timed("label-free"):
        result |= alignment_uniformity(*run.two_views(backbone, few), seed=run.config.seed)
        if before is not None:
            after, old = (x[torch.from_numpy(index)] for x in features)
            result["before"] = alignment_uniformity(*run.two_views(before, few), seed=run.config.seed)
            result["target_drift"] = drift(old, after)
            if len(index) > NEIGHBORS:
                result["neighbor_overlap"] = neighbor_overlap(old, after, NEIGHBORS)
    return result


def _gallery(
    run: _Evaluator, queries: Images, query_features: list[Tensor], gallery: Images, gallery_features: list[Tensor]
) -> dict[str, np.ndarray]:
    """Query images with their nearest gallery images, after and (where given) before, and thumbnails of all."""
    same = queries is gallery
    count = min(NEIGHBORS, len(gallery.paths) - same)
    chosen = run.sample("gallery", len(queries.paths), run.config.gallery)
    arrays: dict[str, np.ndarray] = {}
    files = [queries.paths[i] for i in chosen]
    for prefix, q, g in zip(("", "before_"), query_features, gallery_features, strict=False):
        values, found = nearest_neighbors(q[torch.from_numpy(chosen)], g, min(count + same, len(g)))
        if same:
            keep = found != torch.from_numpy(chosen)[:, None]
            keep[keep.all(dim=1), -1] = False
            values, found = values[keep].view(-1, count), found[keep].view(-1, count)
        names = [gallery.paths[i] for i in found.flatten().tolist()]
        arrays[f"{prefix}neighbors"] = np.arange(len(files), len(files) + len(names)).reshape(len(chosen), count)
        arrays[f"{prefix}similarity"] = values.numpy().astype(np.float32)
        if queries.labeled and gallery.labeled:
            arrays[f"{prefix}right"] = gallery.labels[found.numpy()] == queries.labels[chosen][:, None]
        files += names
    unique = {path: i for i, path in enumerate(dict.fromkeys(files))}
    thumbs = [thumbnail_png(path) for path in unique]
    position = np.array([unique[path] for path in files])
    for key in ("neighbors", "before_neighbors"):
        if key in arrays:
            arrays[key] = position[arrays[key]]
    return arrays | {
        "queries": position[: len(chosen)],
        "thumb_png": np.concatenate(thumbs),
        "thumb_offsets": np.cumsum([0, *map(len, thumbs)]),
        "thumb_names": np.array([os.path.join(*Path(path).parts[-2:]) for path in unique]),
    }


def _map(run: _Evaluator, images: Images, features: Tensor) -> dict[str, np.ndarray]:
    chosen = run.sample("map", len(images.paths), run.config.tsne_points)
    coordinates = tsne(features[torch.from_numpy(chosen)], seed=run.config.seed)
    labels = images.labels[chosen] if images.labeled else np.full(len(chosen), -1)
    return {"tsne": coordinates, "tsne_labels": labels.astype(np.int64)}


@contextmanager
def _at_work(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """The modules on ``device`` in eval mode; afterwards where and as they were."""
    states = [(module, module_device(module), module.training) for module in modules]
    for module in modules:
        module.to(device).eval()
    try:
        yield
    finally:
        for module, home, training in states:
            module.to(home).train(training)


def evaluate_backbone(backbone: Backbone, config: EvalConfig, before: Backbone | None = None) -> Evaluation:
    """Every metric that the given folders allow, for one backbone.

    With class sub-folders in ``config.train`` and ``config.test``: retrieval, clustering, few-shot. With classes in
    ``config.source``: forgetting. Without labels: alignment, uniformity, drift and neighbors, and statements of what
    cannot be known.

    Args:
        backbone: has ``num_features``, ``mean`` and ``std``; it is not changed.
        config: folders and settings; ``checkpoint``, ``before`` and ``out`` are recorded, not used.
        before: the backbone to compare with, usually the initialization.

    Raises:
        ValueError: one class only, class sub-folders that differ between train and test, a class with fewer images
            than a few-shot run needs, unreadable images, features that are not finite.
    """
    run = _Evaluator(config)
    with _at_work([backbone] if before is None else [backbone, before], run.device):
        return _evaluate(run, backbone, before)


def _evaluate(run: _Evaluator, backbone: Backbone, before: Backbone | None) -> Evaluation:
    config = run.config
    train = read_images("train", config.train)
    test = read_images("test", config.test) if config.test else None
    source = read_images("source", config.source) if config.source else None
    judged = train.labeled and test is not None and test.labeled
    if judged:
        assert test is not None
        _check_classes(train, test)
        if wanted := [*config.shots, *config.semi_shots]:  # refused now, not after the features are extracted
            draw_shots(train.labels, max(wanted), seed=config.seed, classes=train.classes)
    backbones = [backbone] if before is None else [backbone, before]
    arms = ("after", "before")
    train_features = [run.features(b, train) for b in backbones]
    test_features = [run.features(b, test) for b in backbones] if test is not None else []
    statements: list[str] = []
    metrics: dict[str, Any] = {
        "labeled": judged,
        "classes": train.classes,
        "counts": {
            name: len(images.paths)
            for name, images in (("train", train), ("test", test), ("source", source))
            if images is not None
        },
    }
    draws: dict[str, dict[str, list[str]]] = {}
    earlier: dict[str, Any] = {}
    if train.labeled:
        for name, x in zip(arms, train_features, strict=False):
            (metrics if name == "after" else earlier)["clustering"] = run.clustering(x, train)
    else:
        statements.append(NO_LABELS)
    if judged:
        assert test is not None
        for name, x, q in zip(arms, train_features, test_features, strict=False):
            (metrics if name == "after" else earlier)["retrieval"] = run.retrieval(x, train, q, test)
        drawn: np.ndarray | None = None
        if config.shots:
            shots = run.fewshot(backbone, train, test)
            drawn = shots.draws
            metrics["fewshot"] = _by_shots(shots, "top1", "mean_class", "train_loss")
            worst = max(max(losses) for losses in shots.train_loss.values())
            if worst > 0.9 * math.log(len(train.classes)):
                statements.append(
                    f"Few-shot finetuning did not settle (training loss up to {worst:.2f}; a guess gives "
                    f"{math.log(len(train.classes)):.2f}), so its accuracies say little about the features: "
                    f"try another fewshot_lr than {config.fewshot_lr:g}."
                )
        if config.semi_shots:
            semi = run.fixmatch(backbone, train, test)
            if drawn is None or semi.draws.shape[2] > drawn.shape[2]:
                drawn = semi.draws  # fewer images a class are the first of more
            metrics["fixmatch"] = _by_shots(semi, "top1", "mean_class", "train_loss", "confident")
            unused = [k for k in config.semi_shots if not max(semi.confident[k])]
            if unused:
                statements.append(
                    f"FixMatch with {', '.join(map(str, unused))} labeled images a class found no confident guess among "
                    "the unlabeled images, so it was few-shot finetuning with more views."
                )
        if drawn is not None:
            draws = {
                str(trial): {
                    name: [os.path.relpath(train.paths[i], config.train) for i in row]
                    for name, row in zip(train.classes, rows, strict=True)
                }
                for trial, rows in enumerate(drawn)
            }
    elif train.labeled:
        statements.append(NO_TEST)
    if earlier:
        metrics["before"] = earlier
    metrics["label_free"] = _label_free(run, backbone, before, train, train_features)
    if before is None:
        statements.append(NO_BEFORE)
    if source is None:
        statements.append(NO_SOURCE)
    else:
        source_features = [run.features(b, source) for b in backbones]
        if before is not None:
            metrics["source_drift"] = drift(source_features[1], source_features[0])
        if source.labeled:
            metrics["forgetting"] = {
                name: run.clustering(x, source) for name, x in zip(arms, source_features, strict=False)
            }
        else:
            statements.append(NO_SOURCE_LABELS)
    arrays: dict[str, np.ndarray] = {}
    shown, shown_features = (test, test_features) if test is not None else (train, train_features)
    with run.timed("map and gallery"):
        if config.tsne_points >= 5 and len(shown.paths) >= 5:
            arrays |= _map(run, shown, shown_features[0])
        if config.gallery and len(train.paths) > 1:
            arrays |= _gallery(run, shown, shown_features, train, train_features)
    metrics |= {
        "statements": statements,
        "timings": {name: round(seconds, 3) for name, seconds in run.timings.items()},
        "backbone": {
            "num_features": int(train_features[0].shape[1]),
            "parameters": sum(p.numel() for p in backbone.parameters()),
            "hash": weights_hash(backbone),
        },
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "config": dataclasses.asdict(config),
    }
    return Evaluation(metrics, arrays, draws)


def write_evaluation(folder: Path | str, result: Evaluation) -> None:
    """Write ``eval_arrays.npz`` (no pickle), ``fewshot_draws.json`` after few-shot runs, and ``eval.json``.

    ``eval.json`` comes last and whole, so that an evaluation that has it is finished.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    (root / "eval.json").unlink(missing_ok=True)
    np.savez_compressed(root / "eval_arrays.npz", **result.arrays)  # type: ignore[arg-type]
    if result.draws:
        text = json.dumps(result.draws, indent=1, ensure_ascii=False) + "\n"
        (root / "fewshot_draws.json").write_text(text, encoding="utf-8")
    write_whole(root / "eval.json", (json.dumps(result.metrics, indent=1, allow_nan=False) + "\n").encode())
