"""Every image once per epoch, and the source evenly, for any sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastuft.data.order import EpochPlan

counts = st.integers(1, 60)


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(0, 60), st.integers(1, 16), st.booleans(), st.integers(0, 5))
def test_the_union_order_covers_every_image_once(num_target, num_source, batch, drop_last, epoch):
    if drop_last and num_target + num_source < batch:
        return
    plan = EpochPlan(num_target, num_source, batch, drop_last=drop_last)
    order = plan.order(7, epoch)
    everything = num_target + num_source
    assert len(set(order.tolist())) == len(order) == (everything // batch * batch if drop_last else everything)
    assert len(order) == 0 or 0 <= order.min() <= order.max() < everything
    assert plan.steps == -(-len(order) // batch)


@settings(max_examples=60, deadline=None)
@given(counts, counts, st.integers(2, 16), st.floats(0, 1), st.booleans())
def test_the_balanced_order_covers_the_target_once_and_the_source_evenly(
    num_target, num_source, batch, share, drop_last
):
    try:
        plan = EpochPlan(num_target, num_source, batch, "balanced", share, drop_last)
    except ValueError:
        assert drop_last and num_target < batch
        return
    uses = np.zeros(num_source, int)
    for epoch in range(4):
        order = plan.order(7, epoch)
        targets = order[order < num_target]
        assert len(set(targets.tolist())) == len(targets)
        if not drop_last:
            assert len(targets) == num_target
        uses += np.bincount(order[order >= num_target] - num_target, minlength=num_source)
        for step in range(plan.steps):
            rows = order[step * batch : (step + 1) * batch]
            assert len(rows) < batch or (rows >= num_target).sum() == plan.source_rows
    assert uses.max() - uses.min() <= 1  # passes over the source continue across epochs


def test_balanced_replay_needs_source_images():
    with pytest.raises(ValueError, match=r"balanced.*name a source folder"):
        EpochPlan(10, 0, 4, "balanced")
