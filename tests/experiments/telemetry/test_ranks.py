"""What ranks tell, in the store: samples of some steps, traffic by layer, and runs that told only its sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from experiments.live import snapshot
from experiments.models import Run
from experiments.telemetry.read import Facts, RangeError, steps_arrays
from spec.events import PARTS, TENSORS, StepDone
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


def cells_of(arrays: dict[str, Any]) -> int:
    return sum(array.size for name, array in arrays.items() if name in TENSORS)


@pytest.mark.parametrize("kinds", [("rank_traffic",), ("part_ms", "rank_traffic", "expert_tokens")])
@pytest.mark.parametrize("layer", [None, 1])
def test_an_answer_has_no_more_numbers_than_the_limit_whatever_the_ranks(
    run: Run, kinds: tuple[str, ...], layer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The range that is just allowed comes whole; one step more comes rolled up: the limit is that of the tensors as they are."""
    send(run, [started(), declared(), *(told(number) for number in range(1, STEPS + 1))])
    whole = read(run, 1, STEPS, *kinds, layer=layer)
    a_row = cells_of(whole) // STEPS
    assert cells_of(whole) == a_row * STEPS
    monkeypatch.setattr("experiments.telemetry.read.MAX_CELLS", 50 * a_row)
    assert len(read(run, 1, 50, *kinds, layer=layer)["step"]) == 50
    rolled = read(run, 1, 51, *kinds, layer=layer)
    assert rolled["n"].tolist() == [64], "bucket 0, whole"
    assert cells_of(rolled) <= 50 * a_row
    monkeypatch.setattr("experiments.telemetry.read.MAX_CELLS", a_row)
    assert len(read(run, 1, 1, *kinds, layer=layer)["step"]) == 1
    assert read(run, 1, STEPS, *kinds, layer=layer)["n"].tolist() == [STEPS], "one bucket of the next level"


def test_ranks_that_joined_later_count_for_every_row(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer's rows are all as large as its largest: 8 ranks in the unfinished bucket make the older rows of 2 as large."""
    wide = [StepDone(n, 1.7e9 + n, step(n).scalars, {"rank_traffic": np.ones((L, 8, 8), np.uint32)}) for n in range(STEPS + 1, STEPS + 4)]
    send(run, [started(), declared(), *(told(number) for number in range(1, STEPS + 1)), *wide])
    monkeypatch.setattr("experiments.telemetry.read.MAX_CELLS", 3 * L * 64)
    assert read(run, STEPS, STEPS + 2, "rank_traffic")["n"].tolist() == [1, 1, 1]
    rolled = read(run, STEPS - 1, STEPS + 2, "rank_traffic")
    assert rolled["n"].tolist() == [5] and rolled["rank_traffic"].shape == (1, L, 8, 8)
    assert read(run, 1, 24, "rank_traffic")["n"].tolist() == [1] * 24, "where all have 2 ranks, 48 rows fit"


def test_too_much_even_at_the_coarsest_level_is_refused_with_the_parameter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    send(run, [started(), declared(), *(told(number) for number in range(1, STEPS + 1))])
    monkeypatch.setattr("experiments.telemetry.read.LEVELS", (64,))
    monkeypatch.setattr("experiments.telemetry.read.MAX_CELLS", 2 * L * RANKS * RANKS)
    with pytest.raises(RangeError, match="tensors: steps 1 to 130 make more than 16 numbers") as refused:
        read(run, 1, STEPS, "rank_traffic")
    assert refused.value.parameter == "tensors"


def test_a_viewer_is_not_sent_more_than_the_limit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    send(run, [started(), declared(), *(told(number) for number in range(1, 31))])
    block = snapshot.missed(run.pk, 0, 0).block
    assert block is not None
    monkeypatch.setattr("experiments.live.snapshot.FILL_CELLS", 30 * L * RANKS * RANKS)  # the traffic alone: the rest is too much
    assert snapshot.missed(run.pk, 0, 0).too_many
