"""The learning rate against the formulas written out."""

from __future__ import annotations

import math

import pytest

from moe.train.schedule import learning_rate
from spec.training import Optimizer


def test_warms_up_linearly_to_the_peak() -> None:
    optimizer = Optimizer(lr=0.5, warmup_steps=10)
    assert [learning_rate(optimizer, step, 100) for step in range(1, 11)] == pytest.approx([0.05 * step for step in range(1, 11)])


def test_falls_along_a_cosine_to_its_share() -> None:
    optimizer = Optimizer(lr=2.0, warmup_steps=20, min_lr_ratio=0.25)
    assert learning_rate(optimizer, 120, 220) == pytest.approx(2 * (0.25 + 0.75 / 2))
    assert learning_rate(optimizer, 70, 220) == pytest.approx(2 * (0.25 + 0.75 * (1 + math.sqrt(0.5)) / 2))
    assert learning_rate(optimizer, 220, 220) == pytest.approx(0.5)
    rates = [learning_rate(optimizer, step, 220) for step in range(20, 221)]
    assert rates == sorted(rates, reverse=True)


def test_constant_stays_at_the_peak() -> None:
    optimizer = Optimizer(lr=0.1, warmup_steps=2, schedule="constant")
    assert [learning_rate(optimizer, step, 5) for step in range(1, 6)] == [0.05, 0.1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (5, 3), (3, 3)])
def test_a_run_shorter_than_its_warm_up_has_a_rate(warmup: int, steps: int) -> None:
    optimizer = Optimizer(lr=1.0, warmup_steps=warmup)
    assert all(0 < learning_rate(optimizer, step, steps) <= 1 for step in range(1, steps + 1))
