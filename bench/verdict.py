"""How well a verdict without labels agrees with labels: rank correlations, regret, and a rule fitted without one data set.

    python bench/verdict.py photos=runs/sweep/sweep.json digits=runs/digits/sweep.json

Reads the files of ``bench/sweep.py``, one per data set, and prints Markdown: the rank correlation of every measure with
accuracy over all looks; and the verdicts of the rule in use, and of a rule fitted to the other data sets, on each run as if
it had ended at each of its looks, with their cost.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastuft.evaluate import Look, Rule, judge

MEASURES = ("effective_rank", "lidar", "uniformity", "alignment", "view_agreement", "neighbors_kept", "source_cka")
LABELS = ("retrieval", "clustering")
MEANS = "class means"  # of as many labels per class as were measured; older sweeps have none
HELPED = 2.0  # points by which a run is better than its start
HARMED = 1.0  # points below the start that an export may lose
GRID = {
    "agreement_gain": (0.1, 0.2, 0.3, 0.35, 0.4, 0.5),
    "agreement_loss": (0.0, 0.1, 0.2, 0.3),
    "spread_gain": (0.0, 0.05, 0.1, 0.2),
    "rank_drop": (0.0, 0.05, 0.1, 0.2),
}


@dataclass(frozen=True)
class Run:
    """One run: its looks, with retrieval and clustering accuracy at each of them in percent.

    Args:
        name: setting and seed.
        looks: its looks, of which the first is the start.
        labels: [looks, len(LABELS)].
        means: few-shot accuracy of class means, averaged over K, [looks]; nan where it was not measured.
    """

    name: str
    looks: list[Look]
    labels: np.ndarray
    means: np.ndarray

    def ends(self) -> list[Run]:
        """The run as it would be if it had ended at each of its looks."""
        counts = range(2, len(self.looks) + 1)
        return [
            Run(f"{self.name} to {self.looks[n - 1].step}", self.looks[:n], self.labels[:n], self.means[:n])
            for n in counts
        ]

    @property
    def gains(self) -> np.ndarray:
        """Gain over the start of each look in points, as the mean of retrieval and clustering."""
        gains: np.ndarray = (self.labels - self.labels[0]).mean(1)
        return gains


@dataclass(frozen=True)
class Outcome:
    """The outcome of a rule for one run.

    Args:
        run: name of the run.
        said: the verdict.
        end: points above the start at the last look.
        exported: points above the start of the weights that ``select: judged`` exports.
        retrieval: the same for retrieval only.
        best: points above the start of the best look; 0 if none is above it.
    """

    run: str
    said: str
    end: float
    exported: float
    retrieval: float
    best: float


def read(file: Path) -> list[Run]:
    """The runs of a sweep's JSON file."""
    runs = []
    for entry in json.loads(file.read_text(encoding="utf-8"))["runs"]:
        rows = [row for row in entry["looks"] if row.get("labels")]
        if len(rows) > 1:
            labels = np.array([[row["labels"][name] for name in LABELS] for row in rows])
            shots = [list(row["labels"].get("class_means", {}).values()) for row in rows]
            means = np.array([np.mean(values) if values else np.nan for values in shots])
            runs.append(Run(f"{entry['setting']}-{entry['seed']}", [Look.of(row) for row in rows], labels, means))
    return runs


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks of values, ties at their mean."""
    array = np.asarray(values, float)
    return np.array([((array < v).sum() + (array <= v).sum() - 1) / 2 for v in array])


def correlation(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation; nan if one is constant or has fewer than two values."""
    a, b = ranks(one), ranks(other)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def correlations(runs: Iterable[Run]) -> dict[str, list[float]]:
    """Rank correlation of each measure's change with the gains in LABELS and in MEANS, over all looks but the starts."""
    pairs = [(run, i) for run in runs for i in range(1, len(run.looks))]
    found = {}
    for name in MEASURES:
        known = [(run, i) for run, i in pairs if None not in (getattr(run.looks[i], name), getattr(run.looks[0], name))]
        changes = np.array([getattr(run.looks[i], name) - getattr(run.looks[0], name) for run, i in known])
        gains = [np.array([run.labels[i, j] - run.labels[0, j] for run, i in known]) for j in range(len(LABELS))]
        gains.append(np.array([run.means[i] - run.means[0] for run, i in known]))
        measured = [np.isfinite(gain) for gain in gains]
        found[name] = [correlation(changes[kept], gain[kept]) for kept, gain in zip(measured, gains, strict=True)]
    return found


def outcome(run: Run, rule: Rule) -> Outcome:
    """Apply a rule to a run."""
    verdict = judge(run.looks, rule)
    steps = [look.step for look in run.looks]
    taken = {"better": verdict.step, "no better": 0, "collapsed": 0}.get(verdict.outcome, steps[-1])
    at = steps.index(taken)
    retrieval = float(run.labels[at, 0] - run.labels[0, 0])
    return Outcome(run.name, verdict.outcome, float(run.gains[-1]), float(run.gains[at]), retrieval, max(run.gains))


def cost(runs: Iterable[Run], rule: Rule) -> float:
    """The cost by which a rule is chosen: first harm, then useful runs that it misses, then regret."""
    total = 0.0
    for run in runs:
        found = outcome(run, rule)
        total += 100.0 * (found.retrieval < -HARMED)
        total += 10.0 * (found.best >= HELPED and found.said != "better")
        total += found.best - found.exported
    return total


def fitted(runs: Sequence[Run]) -> Rule:
    """The rule of the grid with the lowest cost; of equals, the one nearest to the rule in use."""
    rules = [replace(Rule(), **dict(zip(GRID, values, strict=True))) for values in itertools.product(*GRID.values())]
    usual = Rule()
    return min(rules, key=lambda rule: (cost(runs, rule), sum(abs(getattr(rule, n) - getattr(usual, n)) for n in GRID)))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers with two digits."""

    def shown(value: Any) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([shown(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(outcomes: Sequence[Outcome]) -> list[Any]:
    """Runs that helped and how many were recognized, exports below the start, and regret."""
    helped = [found for found in outcomes if found.best >= HELPED]
    told = sum(found.said == "better" for found in helped)
    harmed = sum(found.retrieval < -HARMED for found in outcomes)
    regret = float(np.mean([found.best - found.exported for found in outcomes]))
    return [len(outcomes), f"{told} of {len(helped)}", harmed, regret]


def report(sets: Mapping[str, Sequence[Run]]) -> str:
    """Everything, as Markdown."""
    every = [run for runs in sets.values() for run in runs]
    groups = {**sets, "all": every} if len(sets) > 1 else dict(sets)
    head = ["rank correlation", *(f"{name}: {label}" for name in groups for label in (*LABELS, MEANS))]
    found = {name: correlations(runs) for name, runs in groups.items()}
    parts = [table(head, [[m.replace("_", " "), *(v for name in groups for v in found[name][m])] for m in MEASURES])]
    told, totals = [], []
    ended = {name: [end for run in runs for end in run.ends()] for name, runs in sets.items()}
    for name, runs in ended.items():
        others = [run for other, own in ended.items() if other != name for run in own]
        rules = {"in use": Rule(), **({"fitted on the others": fitted(others)} if others else {})}
        for kind, rule in rules.items():
            thresholds = ", ".join(f"{option} {getattr(rule, option):g}" for option in GRID)
            for extent, some in (("whole runs", sets[name]), ("ended at each look", runs)):
                outcomes = [outcome(run, rule) for run in some]
                totals.append([f"{name}, {extent}: {kind} ({thresholds})", *summary(outcomes)])
            if kind == "in use":
                told += [[f"{name}: {o.run}", o.said, o.end, o.exported, o.retrieval, o.best] for o in outcomes]
    words = ["run", "verdict", "gain at the end", "gain exported", "of it in retrieval", "best gain"]
    parts += [table(words, told)]
    parts += [table(["rule", "runs", "told of those that helped", "harmed exports", "mean regret"], totals)]
    return "\n\n".join(parts)


def main() -> None:
    """Print the report of the named files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sweeps", nargs="+", help="NAME=FILE of each data set's sweep.json; files of one name are one set"
    )
    sets: dict[str, list[Run]] = {}
    for entry in parser.parse_args().sweeps:
        name, _, file = entry.partition("=")
        sets.setdefault(name, []).extend(read(Path(file)))
    print(report(sets))


if __name__ == "__main__":
    main()
