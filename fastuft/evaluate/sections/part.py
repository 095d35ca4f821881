"""What one section adds to an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

# Errors that make a metric unknown: no value for these inputs, diverged training, memory or disk exhausted. Any other error
# is a defect of the program and keeps its traceback.
FAILURES = (ValueError, ArithmeticError, RuntimeError, MemoryError, OSError)


@dataclass(frozen=True)
class Part:
    """A section's share of an evaluation; sections write different keys.

    Args:
        metrics: JSON-able values, accuracies as fractions, for ``eval.json``.
        statements: sentences about what is not known or needs care in reading.
        not_known: why a metric has no value, by its descriptive name.
        arrays: what the report shows.
        draws: files of each few-shot draw, by trial and class.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    statements: list[str] = field(default_factory=list)
    not_known: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    draws: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def known(self, what: str, measure: Callable[[], T]) -> T | None:
        """The value of a metric, or None and a statement that says why there is none.

        Args:
            what: the metric, as the beginning of a sentence.
            measure: returns the value, or raises one of ``FAILURES``.
        """
        try:
            return measure()
        except FAILURES as error:
            self.cannot(what, str(error) or type(error).__name__)
            return None

    def cannot(self, what: str, reason: str) -> None:
        """State that a metric has no value, and why."""
        line = " ".join(reason.splitlines())
        self.not_known[what] = line
        self.statements.append(f"{what} is not known: {line.rstrip('.')}.")

    def put(self, value: object, *keys: str) -> None:
        """Set a metric at nested ``keys``; None is left out."""
        if value is None:
            return
        if not _finite(value):
            self.cannot(" ".join(keys), "it is not a finite number")
            return
        level = self.metrics
        for key in keys[:-1]:
            level = level.setdefault(key, {})
        level[keys[-1]] = value

    def add(self, other: Part) -> None:
        """Add the content of another part."""
        _merge(self.metrics, other.metrics)
        self.statements.extend(other.statements)
        self.not_known.update(other.not_known)
        self.arrays.update(other.arrays)
        for trial, files in other.draws.items():  # draws are nested: smaller ones are the start of larger ones
            if len(next(iter(files.values()))) > len(next(iter(self.draws.get(trial, {"": []}).values()))):
                self.draws[trial] = files


def _finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
