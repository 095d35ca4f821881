"""The parts of a run's files that a report can use; a part of an unexpected kind is left out and named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastuft.names import printable

Arrays = dict[str, np.ndarray]
_LARGEST = 1e30  # larger than any figure
_MAX_DEPTH = 20  # levels of nested values; a run writes four
_PER_SHOTS = {"class_means", "fewshot", "fixmatch"}  # figures by K
# Figures of eval.json, and how deeply they are nested in groups of figures.
_FIGURES = {
    "retrieval": 0,
    "clustering": 0,
    "before": 3,
    "forgetting": 1,
    "label_free": 2,
    "source_drift": 1,
    "class_means": 1,
    "fewshot": 2,
    "fixmatch": 2,
}
_GALLERY = ("thumb_png", "thumb_offsets", "thumb_names", "queries")
_NEIGHBORS = ("neighbors", "similarity", "right")
ARRAYS = {"tsne", "tsne_labels", *_GALLERY, *_NEIGHBORS, *(f"before_{name}" for name in _NEIGHBORS)}  # what is drawn


def is_number(value: object) -> bool:
    """Whether a value can be a figure: a finite number, small enough that sums stay finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def checked_metrics(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, complaints): rows of metrics with a step, and their numbers."""
    kept = [
        {key: value for key, value in row.items() if isinstance(value, str) or is_number(value)}
        for row in rows
        if is_number(row.get("step"))
    ]
    lost = len(rows) - len(kept)
    return kept, [f"{lost} of {len(rows)} rows have no step and are left out"] if lost else []


def checked_summary(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(summary, complaints)."""
    complaints: list[str] = []
    kept = {key: value for key, value in values.items() if _shallow(key, value, complaints)}
    if "steps" in kept and not is_number(kept["steps"]):
        complaints.append("steps is not a number and is left out")
        del kept["steps"]
    return kept, complaints


def checked_evaluation(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(evaluation, complaints): figures are numbers or trials with their mean; statements and classes are text."""
    complaints: list[str] = []
    kept = {key: value for key, value in values.items() if _shallow(key, value, complaints)}
    for key in _FIGURES.keys() & kept.keys():
        kept[key] = _figures(key, kept[key], _FIGURES[key], complaints)
    before = kept.get("before")
    for name, group in (("", kept), ("before.", before if isinstance(before, dict) else {})):
        for key in _PER_SHOTS & group.keys():
            group[key] = _by_shots(name + key, group[key], complaints)
    for key in ("statements", "classes"):
        texts = kept.get(key, [])
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            kept[key] = [printable(text) for text in texts]
        else:
            complaints.append(f"{key} is not a list of strings and is left out")
            kept[key] = []
    timings = kept.get("timings", {})
    if not isinstance(timings, dict) or not all(map(is_number, timings.values())):
        complaints.append("timings are not seconds by part and are left out")
        kept["timings"] = {}
    return kept, complaints


def _shallow(key: str, value: Any, complaints: list[str]) -> bool:
    """Whether a value is nested no deeper than a run writes; otherwise a complaint is added."""
    level, depth = [value], 0
    while level and depth <= _MAX_DEPTH:
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level, depth = [part for parts in inner for part in parts], depth + 1
    if level:
        complaints.append(f"{printable(key)} is nested more than {_MAX_DEPTH} deep and is left out")
    return not level


def _figures(name: str, value: object, depth: int, complaints: list[str]) -> Any:
    """A figure or a group of figures, nested at most ``depth`` deep; None for anything else."""
    if value is None or is_number(value):
        return value
    if isinstance(value, dict) and "mean" not in value and depth > 0:
        return {key: _figures(f"{name}.{printable(key)}", part, depth - 1, complaints) for key, part in value.items()}
    if isinstance(value, dict) and _is_spread(value):
        return value
    complaints.append(f"{name} is not a figure and is left out")
    return None


def _by_shots(name: str, value: object, complaints: list[str]) -> dict[str, Any]:
    """Figures by the number of labeled images; what is under another name is left out."""
    if not isinstance(value, dict):
        complaints += [f"{name} is not a group of figures and is left out"] if value is not None else []
        return {}
    odd = [shots for shots in value if not (shots.isdecimal() and len(shots) < 6)]
    complaints += [f"{name}: {printable(shots)!r} is not a number of images and is left out" for shots in odd]
    return {shots: figures for shots, figures in value.items() if shots not in odd}


def _is_spread(value: Mapping[str, object]) -> bool:
    trials, std = value.get("trials"), value.get("std")
    whole = isinstance(trials, list) and len(trials) > 0 and all(map(is_number, trials))
    return whole and is_number(value["mean"]) and (std is None or is_number(std))


def checked_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[Arrays, list[str]]:
    """(arrays, complaints): the gallery and the map, each whole or absent."""
    kept: Arrays = {}
    complaints = []
    parts: tuple[tuple[str, tuple[str, ...], Callable[[Mapping[str, np.ndarray]], Arrays]], ...] = (
        ("the map", ("tsne",), _map),
        ("the gallery", ("queries", "neighbors", "thumb_png"), _gallery),
    )
    for name, signs, check in parts:
        if not any(sign in arrays for sign in signs):
            continue
        try:
            kept |= check(arrays)
        except (KeyError, ValueError, TypeError) as error:
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
            complaints.append(f"{name} is damaged ({reason}) and is left out")
    return kept, complaints


def _require(name: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{name} does not fit")


def _map(arrays: Mapping[str, np.ndarray]) -> Arrays:
    points, labels = arrays["tsne"], arrays["tsne_labels"]
    floats = np.issubdtype(points.dtype, np.floating)
    _require("tsne", floats and points.ndim == 2 and points.shape[1] == 2 and len(points) > 0)
    _require("tsne", bool((np.abs(points.astype(float)) < 1e6).all()))  # finite, and small enough to plot
    _require("tsne_labels", np.issubdtype(labels.dtype, np.integer) and labels.shape == (len(points),))
    return {"tsne": points, "tsne_labels": labels}


def _gallery(arrays: Mapping[str, np.ndarray]) -> Arrays:
    found = {name: arrays[name] for name in _GALLERY}
    pictures, offsets, names, queries = found.values()
    names.tolist()  # raises on invalid characters
    _require("thumb_png", pictures.dtype == np.uint8 and pictures.ndim == 1)
    _require("thumb_names", names.dtype.kind == "U" and names.ndim == 1)
    _require("thumb_offsets", np.issubdtype(offsets.dtype, np.integer) and offsets.shape == (len(names) + 1,))
    rising = offsets[0] >= 0 and offsets[-1] <= len(pictures) and bool((offsets[1:] >= offsets[:-1]).all())
    _require("thumb_offsets", bool(rising))

    def indices(name: str, shape: tuple[int, ...]) -> np.ndarray:
        found = arrays[name]
        _require(name, np.issubdtype(found.dtype, np.integer) and found.shape == shape)
        _require(name, bool(((found >= 0) & (found < len(names))).all()))
        return found

    indices("queries", (queries.size,))
    for prefix in ("", "before_"):
        if f"{prefix}neighbors" not in arrays:
            continue
        shape = (len(queries), *arrays[f"{prefix}neighbors"].shape[1:2])
        found[f"{prefix}neighbors"] = indices(f"{prefix}neighbors", shape)
        similarity = arrays[f"{prefix}similarity"]
        _require(f"{prefix}similarity", np.issubdtype(similarity.dtype, np.floating) and similarity.shape == shape)
        found[f"{prefix}similarity"] = similarity
        if f"{prefix}right" in arrays:
            _require(
                f"{prefix}right", arrays[f"{prefix}right"].dtype == bool and arrays[f"{prefix}right"].shape == shape
            )
            found[f"{prefix}right"] = arrays[f"{prefix}right"]
    return found
