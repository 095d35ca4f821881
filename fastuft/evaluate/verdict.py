"""A verdict without labels on whether finetuning helped, from the label-free measures of a run.

A run looks at a fixed sample of its target before the first step and at intervals (:mod:`fastuft.evaluate.looks`). This
module is pure: :func:`judge` maps these looks to a verdict, so its thresholds (:class:`Rule`) can be fitted to any set of
recorded runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

Outcome = Literal["better", "no better", "collapsed", "not known"]


@dataclass(frozen=True)
class Look:
    """The label-free measures of one backbone on the sample; None if one has no value.

    Args:
        step: completed steps; 0 is the start.
        images: images in the sample.
        effective_rank: RankMe of the features.
        lidar: LiDAR of two views of each image.
        uniformity: uniformity of the features; lower is more uniform.
        alignment: mean squared distance between the unit features of two views; lower is closer.
        view_agreement: share of nearest neighbors that an image's two views agree on.
        neighbors_kept: share of nearest neighbors that were nearest at the start.
        source_cka: linear CKA with the start, on source images; None without a source.
    """

    step: int
    images: int
    effective_rank: float | None = None
    lidar: float | None = None
    uniformity: float | None = None
    alignment: float | None = None
    view_agreement: float | None = None
    neighbors_kept: float | None = None
    source_cka: float | None = None

    @classmethod
    def of(cls, row: Mapping[str, object]) -> Look:
        """The look in a row of metrics."""
        return cls(**{field.name: row.get(field.name) for field in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Rule:
    """The thresholds of the verdict.

    Changes of effective rank and LiDAR are natural logarithms of the ratio to the start, those of view agreement of the ratio
    of its odds, so that they mean the same for every network. docs/verdict.md says where the values come from and how reliable
    they are.

    Args:
        collapsed_rank: effective rank, relative to the start, below which the features have collapsed.
        collapsed_uniformity: uniformity above which all features are close together (0: they are equal).
        agreement_gain: rise of view agreement from which the features are better, if they have spread too.
        agreement_loss: rise of view agreement below which they are no better: runs dip before they gain, view agreement
            recovers before accuracy does, and it rises more on the images that training saw than on others.
        spread_gain: fall of uniformity from which they have spread.
        rank_drop: fall of effective rank that rules out "better".
        lidar_drop: fall of LiDAR from which they are no better, however well views agree.
        fewest_images: smallest sample that allows a verdict.
        patience: looks without improvement after which a run with ``stop: judged`` ends.
    """

    collapsed_rank: float = 0.25
    collapsed_uniformity: float = -0.15
    agreement_gain: float = 0.35
    agreement_loss: float = 0.3
    spread_gain: float = 0.1
    rank_drop: float = 0.1
    lidar_drop: float = 0.25
    fewest_images: int = 50
    patience: int = 3


@dataclass(frozen=True)
class Verdict:
    """The conclusion from the looks of a run.

    Args:
        outcome: better or no better than the start, collapsed, or not known.
        step: step of the best look, 0 for the start; the last step if the outcome is not known.
        why: the measures behind it, as text.
    """

    outcome: Outcome
    step: int
    why: str

    def line(self) -> str:
        """One plain line for the terminal."""
        said = {
            "better": f"better than the start (best at step {self.step})",
            "no better": "no better than the start",
            "collapsed": "collapsed: the features of all images have become alike",
            "not known": "not known whether it is better than the start",
        }
        return f"Without labels: {said[self.outcome]}; {self.why}"


def _change(now: float | None, then: float | None) -> float | None:
    """log(now / then); None if either has no value."""
    return math.log(now / then) if now and then and now > 0 and then > 0 else None


def agreement_gain(look: Look, start: Look) -> float | None:
    """Rise of the log-odds of view agreement since the start; None if one has no value."""
    if look.view_agreement is None or start.view_agreement is None:
        return None
    now, then = (min(0.995, max(0.005, share)) for share in (look.view_agreement, start.view_agreement))
    return math.log(now / (1 - now)) - math.log(then / (1 - then))


def collapsed(look: Look, start: Look, rule: Rule) -> bool:
    """Whether the features have become alike, or their rank is a small share of what it was at the start."""
    if look.effective_rank is None or look.uniformity is None:
        return True  # without a rank there are no directions left
    if start.effective_rank is not None and look.effective_rank < rule.collapsed_rank * start.effective_rank:
        return True
    spread = start.uniformity is not None and start.uniformity < rule.collapsed_uniformity
    return spread and look.uniformity > rule.collapsed_uniformity


def best_look(looks: Sequence[Look], rule: Rule | None = None) -> Look | None:
    """The look with the highest view agreement after the start that has not collapsed; of equals, the later one."""
    limits, start = rule or Rule(), looks[0]
    whole = [look for look in looks[1:] if not collapsed(look, start, limits)]
    known = [(gain, look.step) for look in whole if (gain := agreement_gain(look, start)) is not None]
    if not known:
        return None
    step = max(known)[1]
    return next(look for look in whole if look.step == step)


def should_stop(looks: Sequence[Look], rule: Rule | None = None) -> bool:
    """Whether no gain is expected: the last look has collapsed, or the best one is ``patience`` looks old."""
    limits = rule or Rule()
    if len(looks) < 2:
        return False
    best = best_look(looks, limits)
    steps = [look.step for look in looks]
    age = len(looks) - 1 - (steps.index(best.step) if best is not None else 0)
    return collapsed(looks[-1], looks[0], limits) or age >= limits.patience


def judge(looks: Sequence[Look], rule: Rule | None = None) -> Verdict:
    """The verdict on the looks of a run, of which the first is the start.

    The best look is the one with the highest view agreement that has not collapsed. It is better than the start if agreement
    rose by ``agreement_gain``, the features have spread (training makes views agree, and agreement alone rises in a collapse
    too), and neither effective rank nor LiDAR fell much. It is no better if agreement rose by less than ``agreement_loss`` at
    every look, or if LiDAR fell much: views then agree because the features tell less apart.

    Args:
        looks: in the order of their steps; the first is at step 0.
        rule: thresholds; None takes the defaults.
    """
    limits = rule or Rule()
    start, later = looks[0], looks[1:]
    last = looks[-1]
    if not later:
        return Verdict("not known", last.step, "there was no look after the start")
    if start.images < limits.fewest_images:
        return Verdict("not known", last.step, f"{start.images} images are too few to tell")
    best = best_look(looks, limits)
    gain = None if best is None else agreement_gain(best, start)
    if best is not None and gain is not None and gain >= limits.agreement_gain and _richer(best, start, limits):
        return Verdict("better", best.step, _compared(best, start))
    if collapsed(last, start, limits):
        return Verdict("collapsed", 0, _compared(last, start))
    if best is None or gain is None:
        return Verdict("not known", last.step, "the agreement of views has no value")
    if gain < limits.agreement_loss or _poorer(best, start, limits):
        return Verdict("no better", 0, _compared(best, start))
    return Verdict("not known", last.step, _compared(last, start))


def _poorer(look: Look, start: Look, rule: Rule) -> bool:
    """Whether LiDAR fell much; False if it has no value."""
    lidar = _change(look.lidar, start.lidar)
    return lidar is not None and lidar < -rule.lidar_drop


def _richer(look: Look, start: Look, rule: Rule) -> bool:
    """Whether the features have spread, and neither effective rank nor LiDAR fell much; False if one has no value."""
    rank, lidar = _change(look.effective_rank, start.effective_rank), _change(look.lidar, start.lidar)
    if rank is None or lidar is None or look.uniformity is None or start.uniformity is None:
        return False
    spread = look.uniformity <= start.uniformity - rule.spread_gain
    return spread and rank >= -rule.rank_drop and not _poorer(look, start, rule)


_WORDS = {
    "effective_rank": ("effective rank", 1),
    "lidar": ("LiDAR", 1),
    "uniformity": ("uniformity", 2),
    "view_agreement": ("view agreement", 3),
}


def _compared(look: Look, start: Look) -> str:
    """The measures at the start and at this look, as text."""
    parts = []
    for name, (words, digits) in _WORDS.items():
        then, now = getattr(start, name), getattr(look, name)
        shown = [f"{value:.{digits}f}" if value is not None else "none" for value in (then, now)]
        parts.append(f"{words} {shown[0]} -> {shown[1]}")
    for name, words in (("neighbors_kept", "neighbors kept"), ("source_cka", "source CKA")):
        if (value := getattr(look, name)) is not None:
            parts.append(f"{words} {value:.2f}")
    return ", ".join(parts)
