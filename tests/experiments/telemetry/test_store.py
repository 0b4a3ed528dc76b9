"""Frames into the store: whole, once, and rolled up as an independent computation would."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from django.db import connection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.models import Run
from experiments.models.telemetry import ArchivedScalar, ArchivedTensor, Event, ScalarRollup, StepScalar, StepTensor, TensorRollup
from experiments.telemetry import payload, read
from experiments.telemetry.write import FencedError, OutOfOrderError, ingest
from spec import block, events
from spec.events import EventError, StepDone
from tests.experiments.telemetry import oracle
from tests.experiments.telemetry.conftest import NAMES, declared, payloads, started, step


def send(run: Run, said: list[Any], *, attempt: int = 1, seq: int = 1, per_frame: int = 50, holder: int | None = None) -> int:
    """Sends events frame by frame; returns the next sequence number."""
    data = payloads(said)
    for start in range(0, len(data), per_frame):
        part = data[start : start + per_frame]
        ingest(run.pk, attempt, seq, part, holder=holder)
        seq += len(part)
    return seq


def block_of(run: Run, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    run.refresh_from_db()
    return block.decode(read.steps_block(run, *args, **kwargs))


def check_everywhere(run: Run, steps: dict[int, StepDone], order: list[str] = NAMES) -> None:
    """Every level, and ranges that begin and end inside buckets, against the oracle."""
    last = max(steps)
    ranges = [(0, last), (1, last), (last // 3, 2 * last // 3), (last - 5, last), (63, 66), (64, 64), (65, 1025)]
    for low, high in ranges:
        for points in (2000, 40, 3):
            header, arrays = block_of(run, low, high, points=points, kinds=["expert_tokens", "router_prob"])
            high = min(high, last)
            if low > high:
                continue
            assert len(arrays["step"]) <= points
            expected = oracle.rows(steps, NAMES, order, header["level"], low, high)
            oracle.check(header, arrays, expected)


@pytest.mark.parametrize(
    "values",
    [
        np.arange(12, dtype=np.uint32).reshape(2, 6) * 70_000_000,
        np.array([[0, 1], [255, 256]], np.uint32),
        np.array([[np.nan, -0.0, 1e-30]], np.float32),
        np.array([[1.5, -2.25e200, np.inf]], np.float64),
        np.zeros((3, 4), np.uint32),
    ],
)
def test_a_payload_unpacks_to_what_was_packed(values: np.ndarray[Any, Any]) -> None:
    packed = payload.encode_rows(values)
    back = payload.decode_rows(packed, values.shape[1])
    assert back.dtype == values.dtype
    assert back.tobytes() == values.tobytes()
    np.testing.assert_array_equal(payload.decode_rows(packed, values.shape[1], slice(1, 2)), values[:, 1:2])


def test_every_zoom_equals_an_independent_computation(run: Run) -> None:
    steps = {n: step(n) for n in range(1, 2200)}
    send(run, [started(), declared(), *steps.values()], per_frame=97)
    check_everywhere(run, steps)
    assert ScalarRollup.objects.filter(run=run, level=64).count() == 2199 // 64
    assert ScalarRollup.objects.filter(run=run, level=1024).count() == 2
    _, arrays = block_of(run, 1, 2199, points=40, kinds=["expert_tokens"], layer=1)
    assert arrays["expert_tokens"].shape[1:] == (1, 3)


def test_the_coarsest_level_is_the_sum_of_all(run: Run) -> None:
    """17,000 steps of one count each, sent in large frames: the top level must hold their exact sums."""
    tensors = {"expert_tokens": np.full((2, 3), 1000, np.uint32)}
    said = [StepDone(n, 1.7e9, np.array([n, 0], np.float32), tensors) for n in range(1, 17_001)]
    send(run, [started(), declared(), *said], per_frame=3000)
    header, arrays = block_of(run, points=2, kinds=["expert_tokens"])
    assert header["level"] == 16384
    assert arrays["n"].tolist() == [16384, 616]
    assert arrays["expert_tokens"][:, 0, 0].tolist() == [16_384_000.0, 616_000.0]
    assert arrays["scalars_max"][:, 0].tolist() == [16384.0, 17000.0]


@pytest.mark.parametrize("stride", [10, 64, 100])
def test_steps_with_gaps_and_step_zero(run: Run, stride: int) -> None:
    steps = {n: step(n) for n in range(0, 3000, stride)}
    send(run, [started(), declared(), *steps.values()], per_frame=7)
    header, arrays = block_of(run, points=3, kinds=["expert_tokens", "router_prob"])
    oracle.check(header, arrays, oracle.rows(steps, NAMES, NAMES, header["level"], 0, max(steps)))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False), st.integers(1, 60))
def test_steps_in_any_order_and_any_frames(make_run: Callable[..., Run], rng: random.Random, per_frame: int) -> None:
    run = make_run()
    numbers = sorted(rng.sample(range(1, 400), 150))
    late = rng.sample(range(400), 30)
    shuffled = [n for n in numbers if n not in late] + [n for n in numbers if n in late]
    steps = {n: step(n, tensors=n % 3 != 0) for n in numbers}
    send(run, [started(), declared(), *(steps[n] for n in shuffled)], per_frame=per_frame)
    for points in (2000, 5):
        header, arrays = block_of(run, points=points, kinds=["expert_tokens", "router_prob"])
        oracle.check(header, arrays, oracle.rows(steps, NAMES, NAMES, header["level"], 0, max(numbers)))


def test_names_may_be_declared_anew_in_another_order(run: Run) -> None:
    first = [StepDone(n, 1.7e9, np.array([n, 10 * n], np.float32)) for n in range(1, 71)]
    second = [StepDone(n, 1.7e9, np.array([7, n, 9], np.float32)) for n in range(71, 141)]
    send(run, [started(), declared(["loss", "lr"]), *first, declared(["new", "loss", "lr"]), *second])
    run.refresh_from_db()
    assert run.metric_names == ["loss", "lr", "new"]
    assert run.summary == {"loss": 140.0, "lr": 9.0, "new": 7.0}
    header, arrays = block_of(run, names=["new", "loss"], points=3)
    assert header["names"] == ["new", "loss"]
    assert np.isnan(arrays["scalars_min"][0, 0])
    assert arrays["scalars_max"][:, 1].tolist() == [64.0, 128.0, 140.0]


def test_a_frame_sent_five_times_by_four_writers_is_stored_once(run: Run) -> None:
    steps = [step(n) for n in range(1, 301)]
    said = payloads([started(), declared(), *steps])
    frames = [(i + 1, said[i : i + 20]) for i in range(0, len(said), 20)] * 5
    random.Random(1).shuffle(frames)
    failures: list[BaseException] = []

    def write(mine: list[tuple[int, list[memoryview]]]) -> None:
        try:
            for _ in range(200):
                mine[:] = [item for item in mine if not _stored(run, *item)]
                if not mine:
                    return
        except BaseException as error:
            failures.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=write, args=(frames[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert StepScalar.objects.filter(run=run).count() == 300
    check_everywhere(run, {item.step: item for item in steps})
    assert Event.objects.filter(run=run).count() == 1


def _stored(run: Run, seq: int, part: list[memoryview]) -> bool:
    try:
        ingest(run.pk, 1, seq, part)
        return True
    except OutOfOrderError:
        return False


def test_a_stale_attempt_and_an_ended_run_are_fenced(make_run: Callable[..., Run]) -> None:
    run = make_run(attempt=2)
    with pytest.raises(FencedError):
        send(run, [started(1)], attempt=1)
    send(run, [started(2), declared(), step(1), events.RunEnded(at=1.7e9, outcome="succeeded", reason="finished")], attempt=2)
    run.refresh_from_db()
    assert run.state == "succeeded"
    with pytest.raises(FencedError):
        send(run, [step(2)], attempt=2, seq=5)
    assert StepScalar.objects.filter(run=run).count() == 1


@pytest.mark.parametrize("bad", [b"", b"MLB1", b"x" * 100, events.encode(step(7))[:-9], events.encode(step(5, width=3))])
def test_a_frame_with_one_bad_record_leaves_nothing(run: Run, bad: bytes) -> None:
    seq = send(run, [started(), declared(), step(1)])
    with pytest.raises(EventError):
        ingest(run.pk, 1, seq, [*payloads([step(2), step(3)]), memoryview(bad), *payloads([step(4)])])
    assert list(StepScalar.objects.filter(run=run).values_list("step", flat=True)) == [1]
    assert send(run, [step(2)], seq=seq) == seq + 1


def test_a_frame_that_skips_records_is_refused(run: Run) -> None:
    with pytest.raises(OutOfOrderError):
        ingest(run.pk, 1, 2, payloads([declared()]))


def test_what_a_dead_attempt_wrote_past_the_checkpoint_is_archived(make_run: Callable[..., Run]) -> None:
    run = make_run()
    first = {n: step(n, salt=1) for n in range(1, 1101)}
    send(run, [started(1), declared(), *first.values()])
    Run.objects.filter(pk=run.pk).update(attempt=2)
    second = {n: step(n, salt=2) for n in range(501, 1301)}
    # The new supervisor first ships what the old spool still holds, then its own; steps past 500 of the old one do not count any more.
    late = {n: step(n, salt=1) for n in range(1101, 1121)}
    next_seq = len(first) + 3
    ingest(run.pk, 1, next_seq, payloads(list(late.values())[:10]), holder=2)
    stored = ingest(run.pk, 2, 1, payloads([started(2, 500), declared()]), holder=2)
    assert stored.rewound_to == 500
    check_everywhere(run, {n: first[n] for n in range(1, 501)})
    send(run, list(second.values())[:600], attempt=2, seq=3)
    ingest(run.pk, 1, next_seq + 10, payloads(list(late.values())[10:]), holder=2)
    send(run, list(second.values())[600:], attempt=2, seq=603)
    check_everywhere(run, {**{n: first[n] for n in range(1, 501)}, **second})
    assert sorted(ArchivedScalar.objects.filter(run=run).values_list("step", flat=True)) == list(range(501, 1121))
    assert ArchivedTensor.objects.filter(run=run, attempt=1).count() == 2 * 620
    assert StepTensor.objects.filter(run=run).count() == 2 * 1300


def test_an_attempt_that_begins_anew_archives_everything(make_run: Callable[..., Run]) -> None:
    run = make_run()
    send(run, [started(1), declared(), *(step(n) for n in range(1, 201))])
    Run.objects.filter(pk=run.pk).update(attempt=2)
    assert ingest(run.pk, 2, 1, payloads([started(2, None)])).rewound_to == 0
    run.refresh_from_db()
    assert run.last_step == 0
    assert not ScalarRollup.objects.filter(run=run).exists()
    assert not TensorRollup.objects.filter(run=run).exists()


def test_events_change_the_run(run: Run) -> None:
    spike = events.SpikeDetected(step=3, at=1.7e9, loss=9, median=1, deviation=1, score=8, router=[{"layer": 0, "max_vio": 1}])
    saved = events.CheckpointSaved(step=2, at=1.7e9, path="/c", size_bytes=5, sha256="0" * 64, seconds=1)
    evals = [events.EvalDone(step=n, at=1.7e9, loss=loss) for n, loss in ((1, 2.0), (2, 1.5), (3, 1.75))]
    send(run, [started(), declared(), step(1), spike, saved, *evals])
    run.refresh_from_db()
    assert (run.spikes, run.best_val_loss, run.summary["val_loss"]) == (1, 1.5, 1.75)
    assert run.checkpoints.get().step == 2
    kinds = ["run_started", "spike_detected", "checkpoint_saved", *["eval_done"] * 3]
    assert list(Event.objects.filter(run=run).order_by("id").values_list("kind", flat=True)) == kinds


def test_a_run_takes_its_telemetry_with_it(run: Run) -> None:
    send(run, [started(), declared(), *(step(n) for n in range(1, 130))])
    run.delete()
    for table in (StepScalar, StepTensor, ScalarRollup, TensorRollup, Event):
        assert not table.objects.exists()
