"""From looks to a verdict: better, no better, collapsed or not known, and which step is best."""

from __future__ import annotations

import dataclasses

import pytest

from fastuft.evaluate import Look, Rule, best_look, judge, should_stop
from fastuft.evaluate.verdict import agreement_gain

START = Look(0, 256, effective_rank=40.0, lidar=20.0, uniformity=-2.0, alignment=0.3, view_agreement=0.5)


def later(step, **changes):
    return dataclasses.replace(START, step=step, **changes)


def good(step, view_agreement=0.6, **changes):
    """A look with more view agreement and spread features."""
    return later(step, **{"view_agreement": view_agreement, "uniformity": -2.4, **changes})


def test_agreeing_views_with_spread_features_are_better():
    verdict = judge([START, later(10, view_agreement=0.4), good(20), good(30, 0.7), good(40, 0.65)])
    assert (verdict.outcome, verdict.step) == ("better", 30)
    assert "better than the start (best at step 30); effective rank 40.0 -> 40.0" in verdict.line()


def test_less_agreement_is_not_better_and_selects_the_start():
    verdict = judge([START, good(10, 0.45), good(20, 0.54)])
    assert (verdict.outcome, verdict.step) == ("no better", 0)


def test_view_agreement_and_alignment_alone_never_mean_better():
    verdict = judge([START, later(10, view_agreement=0.9, alignment=0.01)])
    assert (verdict.outcome, verdict.step) == ("not known", 10)


@pytest.mark.parametrize(
    "fallen",
    [
        {"view_agreement": 0.58},
        {"uniformity": -1.9},
        {"lidar": None},
        {"effective_rank": 30.0},
    ],
)
def test_a_small_gain_or_conflicting_measures_are_unknown(fallen):
    assert judge([START, good(10, **fallen)]).outcome == "not known"


def test_views_that_agree_because_lidar_fell_are_no_better():
    assert judge([START, good(10, 0.7, lidar=15.7)]).outcome == "better"
    verdict = judge([START, good(10, 0.7, lidar=15.4)])
    assert (verdict.outcome, verdict.step) == ("no better", 0)
    assert judge([START, good(10, 0.7, lidar=15.4)], Rule(lidar_drop=0.3)).outcome == "better"


@pytest.mark.parametrize(
    "change", [{"effective_rank": 5.0}, {"effective_rank": None}, {"uniformity": -0.01}, {"uniformity": None}]
)
def test_equal_features_are_a_collapse(change):
    looks = [START, later(10, **change)]
    assert (judge(looks).outcome, judge(looks).step) == ("collapsed", 0)
    assert should_stop(looks)


def test_a_good_look_before_a_collapse_is_selected():
    verdict = judge([START, good(10), later(20, effective_rank=2.0)])
    assert (verdict.outcome, verdict.step) == ("better", 10)


def test_a_compact_start_is_not_a_collapse():
    start = dataclasses.replace(START, uniformity=-0.1)
    look = dataclasses.replace(start, step=5, view_agreement=0.6, uniformity=-0.3)
    assert judge([start, look]).outcome == "better"


@pytest.mark.parametrize(
    ("looks", "why"),
    [
        ([START], "no look after the start"),
        ([dataclasses.replace(START, images=20), later(10, images=20, lidar=90.0)], "20 images are too few"),
        ([dataclasses.replace(START, view_agreement=None), later(10)], "has no value"),
    ],
)
def test_an_unknown_verdict_selects_the_last_step(looks, why):
    verdict = judge(looks)
    assert (verdict.outcome, verdict.step) == ("not known", looks[-1].step) and why in verdict.why


def test_the_best_so_far_is_the_last_or_an_earlier_step():
    """A new look becomes the best or leaves the best unchanged, so a run needs to keep only one file."""
    looks = [START]
    best = None
    for number, agreement in enumerate([0.41, 0.45, 0.44, 0.45, 0.03, 0.5, 0.49], 1):
        looks.append(good(number, agreement))
        now = best_look(looks)
        assert now is best or now is looks[-1]
        best = now
    assert best.step == 6


def test_a_run_stops_after_looks_without_improvement():
    looks = [START, good(1), later(2), later(3)]
    assert not should_stop(looks)
    assert should_stop([*looks, later(4)])
    assert not should_stop([*looks, good(4, 0.7)])
    assert not should_stop([START])


def test_agreement_is_compared_by_its_odds():
    """From 60 to 68 % and from 18 to 24 % are equal gains."""
    for start, now in ((0.602, 0.683), (0.18, 0.238)):
        looks = [dataclasses.replace(START, view_agreement=start), good(10, now)]
        assert agreement_gain(looks[1], looks[0]) == pytest.approx(0.353, abs=0.01)
        assert judge(looks).outcome == "better"
    assert agreement_gain(later(1, view_agreement=1.0), later(0, view_agreement=0.999)) == pytest.approx(0.0)


def test_thresholds_can_be_given():
    looks = [START, good(10, 0.56)]
    assert judge(looks).outcome == "no better"
    assert judge(looks, Rule(agreement_loss=0.24)).outcome == "not known"
    assert judge(looks, Rule(agreement_gain=0.24)).outcome == "better"


def test_a_row_of_metrics_is_a_look():
    row = {"kind": "look", "epoch": 1, "time": 0.0, **dataclasses.asdict(later(3, source_cka=0.9))}
    assert Look.of(row) == later(3, source_cka=0.9)
