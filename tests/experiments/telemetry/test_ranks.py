"""What ranks tell, in the store: samples of some steps, traffic by layer, and runs that told only its sum."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.models import Run
from experiments.telemetry.read import Facts, steps_arrays
from spec.events import PARTS, StepDone
from tests.experiments.telemetry.conftest import L, declared, started, step
from tests.experiments.telemetry.test_store import send

RANKS, EVERY, STEPS = 2, 10, 130


def traffic(number: int) -> Any:
    return np.random.default_rng(number).integers(0, 1000, (L, RANKS, RANKS)).astype(np.uint32)


def parts(number: int) -> Any:
    return np.random.default_rng(number).random((RANKS, len(PARTS), 2)).astype(np.float32)


def told(number: int) -> StepDone:
    plain = step(number)
    tensors = {**plain.tensors, "rank_traffic": traffic(number)}
    if number % EVERY == 0:
        tensors |= {"part_ms": parts(number), "sent_bytes": np.full(RANKS, number, np.float32)}
    return StepDone(number, plain.at, plain.scalars, tensors)


def read(run: Run, low: int, high: int, *kinds: str, **options: Any) -> dict[str, Any]:
    return steps_arrays(Facts.of(Run.objects.get(pk=run.pk)), low, high, names=[], kinds=kinds, **options)[1]


def test_samples_and_traffic_come_back_at_every_level(run: Run) -> None:
    send(run, [started(), declared(), *(told(number) for number in range(1, STEPS + 1))])
    steps = read(run, 18, 21, "part_ms", "sent_bytes", "rank_traffic")
    assert steps["part_ms_n"].tolist() == steps["sent_bytes_n"].tolist() == [0, 0, 1, 0]
    np.testing.assert_array_equal(steps["part_ms"][2], parts(20))
    np.testing.assert_array_equal(steps["rank_traffic"], [traffic(number) for number in range(18, 22)])
    np.testing.assert_array_equal(read(run, 5, 5, "rank_traffic", layer=1)["rank_traffic"], [traffic(5)[1:]])
    rolled = read(run, 1, 64, "part_ms", "sent_bytes", "rank_traffic", points=1)
    assert rolled["part_ms_n"].tolist() == [6]
    np.testing.assert_allclose(rolled["part_ms"][0], np.mean([parts(number) for number in range(10, 61, 10)], axis=0), rtol=1e-6)
    assert rolled["sent_bytes"].tolist() == [[35.0] * RANKS]
    np.testing.assert_array_equal(rolled["rank_traffic"][0], sum(traffic(number).astype(float) for number in range(1, 65)))


def test_an_older_run_that_goes_on_keeps_what_it_told(run: Run) -> None:
    older = [StepDone(n, 1.7e9 + n, step(n).scalars, {**step(n).tensors, "rank_tokens": traffic(n).sum(0, dtype=np.uint32)}) for n in range(1, 11)]
    send(run, [started(), declared(), *older, *(told(number) for number in range(11, 81))])
    both = read(run, 9, 12, "rank_tokens", "rank_traffic")
    assert both["rank_tokens_n"].tolist() == [1, 1, 0, 0] and both["rank_traffic_n"].tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(both["rank_tokens"][:2], [traffic(9).sum(0), traffic(10).sum(0)])
    np.testing.assert_array_equal(both["rank_traffic"][2:], [traffic(11), traffic(12)])
    rolled = read(run, 1, 64, "rank_tokens", "rank_traffic", points=1)
    assert rolled["rank_tokens_n"].tolist() == [10] and rolled["rank_traffic_n"].tolist() == [54]
