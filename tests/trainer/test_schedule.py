"""Learning rates."""

from __future__ import annotations

import math

import pytest

from fastuft.config import OptimConfig
from fastuft.trainer.schedule import base_lr, lr_at


def test_cosine_decays_from_the_rate_to_zero():
    optim = OptimConfig(lr=0.015, epochs=10)
    rates = [lr_at(step, 100, 10, optim, 256) for step in range(101)]
    assert rates[0] == 0.015 and rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[50] == pytest.approx(0.0075)
    assert rates[25] == pytest.approx(0.015 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates == sorted(rates, reverse=True)


def test_constant_schedule_after_warmup():
    optim = OptimConfig(lr=0.1, schedule="constant", warmup_epochs=2)
    rates = [lr_at(step, 100, 5, optim, 64) for step in range(100)]
    assert rates[:10] == pytest.approx([0.01 * (step + 1) for step in range(10)])
    assert set(rates[10:]) == {0.1}


def test_rate_scaling_is_linear_in_the_batch_and_optional():
    assert base_lr(OptimConfig(lr=0.015), 2048) == 0.015
    assert base_lr(OptimConfig(lr=0.015, scale_lr=True), 256) == 0.015
    assert base_lr(OptimConfig(lr=0.03, scale_lr=True), 2048) == pytest.approx(0.24)
