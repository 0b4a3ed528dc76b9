"""Spike detection against a definition written with the statistics module."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.train.spikes import SpikeDetector


def oracle(losses: list[float], window: int, threshold: float) -> list[int]:
    """Indices at which a spike begins: above the threshold, and the one before was not."""
    above = []
    for index, loss in enumerate(losses):
        past = losses[index - window : index] if index >= window else []
        if not past:
            above.append(False)
            continue
        median = statistics.median(past)
        mad = 1.4826 * statistics.median(abs(value - median) for value in past)
        above.append((loss - median) / max(mad, 1e-3 * abs(median), 2.0**-52) > threshold)
    return [index for index, spike in enumerate(above) if spike and not (index and above[index - 1])]


def found(detector: SpikeDetector, losses: list[float]) -> list[int]:
    return [index for index, loss in enumerate(losses) if detector.observe(loss)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=0, max_size=60), st.integers(8, 16), st.floats(0.5, 10))
def test_agrees_with_the_definition(losses: list[float], window: int, threshold: float) -> None:
    assert found(SpikeDetector(window, threshold), losses) == oracle(losses, window, threshold)


def falling(steps: int) -> list[float]:
    noise = random.Random(0)
    return [1.5 + 4 / (1 + step / 20) + noise.gauss(0, 0.05) for step in range(steps)]


def test_a_training_curve_without_spikes_has_none() -> None:
    assert found(SpikeDetector(64, 6.0), falling(1000)) == []


def test_a_planted_spike_is_found_once_where_it_begins() -> None:
    losses = falling(400)
    for step in range(300, 305):
        losses[step] += 2
    detector = SpikeDetector(64, 6.0)
    spikes = {step: spike for step, loss in enumerate(losses) if (spike := detector.observe(loss))}
    assert list(spikes) == [300]
    spike = spikes[300]
    assert spike.loss == losses[300]
    assert spike.median == statistics.median(losses[236:300])
    assert spike.score == pytest.approx((spike.loss - spike.median) / spike.deviation)


def test_a_wild_beginning_is_not_judged() -> None:
    assert found(SpikeDetector(64, 6.0), [5.0, 50.0, 5.0, 500.0] + [5.0] * 50) == []


def test_a_constant_loss_does_not_spike_on_rounding() -> None:
    assert found(SpikeDetector(8, 6.0), [2.0] * 20 + [2.001, 2.0, 2.3]) == [22]


def test_goes_on_where_an_earlier_detector_stopped() -> None:
    losses = falling(200)
    losses[150] = losses[151] = 9.0
    whole = found(SpikeDetector(32, 6.0), losses)
    first = SpikeDetector(32, 6.0)
    before = found(first, losses[:151])
    after = found(SpikeDetector(32, 6.0, list(first.losses), first.inside), losses[151:])
    assert before + [index + 151 for index in after] == whole == [150]
