"""Events: there and back, bounded by what the store can hold, and EventError for everything else."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from spec import block, events
from spec.events import TENSOR_BY_CODE, TENSORS, EventError, StepDone, decode, encode

TEXT = st.text(max_size=10)
STEP = st.integers(0, 2**31 - 1)
SIZE = st.integers(0, 2**63 - 1)
TIME = st.floats(0, 1e11, exclude_max=True)
REAL = st.floats(allow_nan=False, allow_infinity=False)
CLOSED = st.one_of(
    st.builds(
        events.RunStarted,
        attempt=STEP,
        at=TIME,
        resumed_from_step=st.none() | STEP,
        world_size=st.integers(1, 64),
        devices=st.lists(TEXT, max_size=3),
        total_params=SIZE,
        active_params=SIZE,
        tokens_per_step=SIZE,
        steps=STEP,
        moe_layers=st.lists(STEP, max_size=4),
        n_experts=STEP,
        top_k=STEP,
        phases=st.lists(TEXT, max_size=3),
        balance_terms=st.lists(TEXT, max_size=3),
        ops=st.dictionaries(TEXT, TEXT, max_size=3),
        versions=st.dictionaries(TEXT, TEXT, max_size=3),
    ),
    st.builds(events.MetricsDeclared, names=st.lists(TEXT, max_size=5)),
    st.builds(events.EvalDone, step=STEP, at=TIME, loss=REAL, by_domain=st.dictionaries(TEXT, REAL, max_size=3), max_vio_global=st.none() | REAL),
    st.builds(
        events.SpikeDetected,
        step=STEP,
        at=TIME,
        loss=REAL,
        median=REAL,
        deviation=REAL,
        score=REAL,
        router=st.lists(st.dictionaries(TEXT, REAL, max_size=3), max_size=3),
    ),
    st.builds(events.CheckpointSaved, step=STEP, at=TIME, path=TEXT, size_bytes=SIZE, sha256=TEXT, seconds=st.floats(0, 1e6)),
    st.builds(
        events.RunEnded,
        at=TIME,
        outcome=st.sampled_from(["succeeded", "failed", "cancelled", "paused"]),
        reason=TEXT,
        detail=TEXT,
        exit_code=st.none() | st.integers(-(2**31), 2**31 - 1),
        signal=st.none() | st.integers(0, 64),
        log_tail=TEXT,
    ),
)


@settings(max_examples=300, deadline=None)
@given(CLOSED)
def test_closed_events_there_and_back(event: events.Event) -> None:
    assert decode(encode(event)) == event


@st.composite
def steps(draw: st.DrawFn) -> StepDone:
    tensors = {}
    for kind in draw(st.lists(st.sampled_from(list(TENSORS.values())), unique=True)):
        shape = [draw(st.integers(0, 4)) for _ in kind.axes]
        tensors[kind.name] = np.arange(int(np.prod(shape)), dtype=kind.dtype).reshape(shape)
    scalars = np.array(draw(st.lists(st.floats(width=32), max_size=6)), dtype=np.float32)
    return StepDone(step=draw(STEP), at=draw(TIME), scalars=scalars, tensors=tensors)


@settings(max_examples=200, deadline=None)
@given(steps())
def test_steps_there_and_back_with_nan_for_the_unknown(event: StepDone) -> None:
    found = decode(encode(event))
    assert isinstance(found, StepDone)
    assert (found.step, found.at) == (event.step, event.at)
    np.testing.assert_array_equal(found.scalars, event.scalars)
    assert list(found.tensors) == list(event.tensors)
    for name, array in event.tensors.items():
        assert found.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(found.tensors[name], array)


def step(arrays: dict[str, Any] | None = None, **header: Any) -> bytes:
    arrays = {"scalars": np.zeros(2, np.float32)} if arrays is None else arrays
    return block.encode({"event": "step_done", "step": 1, "at": 1.0, **header}, arrays)


ONE = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        block.encode({}, {}),
        block.encode({"event": "step_undone"}, {}),
        block.encode({"event": ["run_ended"]}, {}),
        block.encode({"event": None}, {}),
        step({}),
        step(step=-1),
        step(step=2**31),
        step(step=True),
        step(step=1.0),
        step(at="now"),
        step(at=True),
        step(at=1e12),
        step(at=-1),
        step(at=10**400),
        step({"scalars": np.zeros((1, 1), np.float32)}),
        step({"scalars": np.zeros(1, np.float64)}),
        step({"scalars": np.zeros(501, np.float32)}),
        step({"scalars": ONE, "unheard_of": ONE}),
        step({"scalars": ONE, "expert_tokens": np.zeros((2, 2), np.float32)}),
        step({"scalars": ONE, "expert_tokens": np.zeros(2, np.uint32)}),
        block.encode({"event": "metrics_declared", "names": ["x"] * 501}, {}),
        block.encode({"event": "metrics_declared", "names": ["x" * 201]}, {}),
        block.encode({"event": "metrics_declared", "names": ["x"], "more": 1}, {}),
        block.encode({"event": "eval_done", "step": 2**31, "at": 1, "loss": 1}, {}),
        block.encode({"event": "checkpoint_saved", "step": 1, "at": 1, "path": "p", "size_bytes": 2**63, "sha256": "", "seconds": 0}, {}),
        block.encode({"event": "run_ended", "at": 1, "outcome": "vanished"}, {}),
        encode(events.EvalDone(step=1, at=1, loss=1.0)).replace(b'"loss":1.0', b'"loss":NaN'),
        step().replace(b'"at":1.0', b'"at":NaN'),
    ],
)
def test_what_cannot_be_stored_is_no_event(data: bytes) -> None:
    with pytest.raises(EventError):
        decode(data)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=100), CLOSED, st.data())
def test_garbage_and_damage_raise_nothing_else(garbage: bytes, event: events.Event, data: st.DataObject) -> None:
    for whole in (bytearray(encode(event)), bytearray(step())):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
        for candidate in (garbage, bytes(whole), bytes(whole[:place])):
            with contextlib.suppress(EventError):
                decode(candidate)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | REAL | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=500, deadline=None)
@given(CLOSED, st.data())
def test_any_value_in_any_field_is_an_event_or_refused(event: events.Event, data: st.DataObject) -> None:
    assert not isinstance(event, StepDone)
    header = event.model_dump()
    header[data.draw(st.sampled_from(sorted(header)))] = data.draw(JSON)
    with contextlib.suppress(EventError):
        assert encode(decode(block.encode(header, {})))


def test_text_of_an_event_is_mended_and_not_refused() -> None:
    log = "loss 1.0\r\n\x1b[31mred\x1b[0m \0 caf\udce9\ttab"
    event = events.RunEnded(at=1.0, outcome="failed", detail="\ud800", log_tail=log)
    assert event.detail == "\ufffd"
    assert event.log_tail == "loss 1.0\r\n\ufffd[31mred\ufffd[0m \ufffd caf\ufffd\ttab"
    assert decode(encode(event)) == event
    started = events.RunStarted(attempt=1, at=1.0, ops={"a\0": "b\0"})
    assert started.ops == {"a\ufffd": "b\ufffd"}


def test_events_are_immutable_and_closed() -> None:
    event = events.EvalDone(step=1, at=1.0, loss=2.0)
    with pytest.raises(ValidationError):
        event.loss = 1.0
    with pytest.raises(ValidationError):
        events.EvalDone(step=1, at=1.0, loss=float("nan"))


def test_codes_of_tensors_are_kept_by_the_store_and_never_change() -> None:
    assert {code: kind.name for code, kind in TENSOR_BY_CODE.items()} == {
        1: "expert_tokens",
        2: "router_prob",
        3: "dropped",
        4: "expert_bias",
        5: "rank_tokens",
        6: "phase_ms",
        7: "balance_loss",
        8: "router_entropy",
        9: "attention_tokens",
        10: "part_ms",
        11: "rank_traffic",
        12: "sent_bytes",
    }
    assert all(kind.dtype in block.DTYPES for kind in TENSORS.values())
