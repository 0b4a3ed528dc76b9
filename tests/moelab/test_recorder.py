"""What the recorder refuses, and that it never holds up whoever records."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from moelab import ApiError, Recorder, shipper
from moelab.recording import Facts, InUseError, Recording, leftovers, sync
from spec import events, spool
from tests.workers.ingest_server import IngestServer


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    monkeypatch.setenv("MOELAB_SERVER", "http://127.0.0.1:9")


def recorded(tmp_path: Path) -> list[events.Event]:
    (path,) = tmp_path.glob("recordings/*/events.spool")
    with spool.Reader(path) as reader:
        return [events.decode(payload) for _, payload in reader.read()]


def test_with_no_server_everything_is_kept_and_nobody_waits(tmp_path: Path) -> None:
    recorder = Recorder("x", moe_layers=[0, 2], n_experts=2, top_k=1)
    began = time.monotonic()
    for step in range(1, 501):
        recorder.log(step, {"loss": 1.0 / step, "lr": 0.1}, expert_tokens=[[3, 1], [2, 2]], router_prob=np.full((2, 2), 0.5))
    assert time.monotonic() - began < 2
    assert recorder.finish(timeout_s=0.1) is False
    found = recorded(tmp_path)
    assert [type(event).__name__ for event in found[:3]] == ["RunStarted", "MetricsDeclared", "StepDone"]
    assert [event.step for event in found if isinstance(event, events.StepDone)] == list(range(1, 501))
    assert isinstance(found[-1], events.RunEnded) and found[-1].outcome == "succeeded"
    (directory,) = tmp_path.glob("recordings/*")
    with pytest.raises(InUseError):
        Recording.open(directory)
    assert leftovers() == []


def test_a_failure_in_the_with_block_is_told(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Recorder("x") as recorder:
        recorder.finish = lambda *a, **k: Recorder.finish(recorder, *a, **k | {"timeout_s": 0.1})  # type: ignore[method-assign]
        1 / 0  # noqa: B018
    ended = recorded(tmp_path)[-1]
    assert isinstance(ended, events.RunEnded)
    assert (ended.outcome, ended.detail) == ("failed", "ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("step", "tensors", "words"),
    [
        (0, {}, "step 0 does not follow step 0"),
        (1, {"expert_tokens": [[1, 2, 3]]}, r"expert_tokens has shape \[1, 3\], not \[1, 2\]"),
        (1, {"expert_tokens": [[-1, 2]]}, "counts from 0"),
        (1, {"no_such": [1]}, "'no_such' is none of expert_tokens"),
        (1, {"rank_tokens": [1]}, "rank_tokens has 1 axes, not 2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, step: int, tensors: dict[str, object], words: str) -> None:
    recorder = Recorder("x", moe_layers=[0], n_experts=2)
    with pytest.raises(ValueError, match=words):
        recorder.log(step, {"loss": 1.0}, **tensors)  # type: ignore[arg-type]
    recorder.finish(timeout_s=0)
    with pytest.raises(ValueError, match="finished"):
        recorder.log(5, {})
    assert not any(isinstance(event, events.StepDone) for event in recorded(tmp_path))


def test_too_many_scalars(tmp_path: Path) -> None:
    recorder = Recorder("x")
    with pytest.raises(ValueError, match="501 scalars > limit 500"):
        recorder.log(1, {f"m{i}": 0.0 for i in range(501)})
    recorder.log(1, {f"m{i}": 0.0 for i in range(500)})
    recorder.finish(timeout_s=0)


def test_a_token_that_may_not_send_costs_no_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipper, "BACK_OFF_S", (0.0, 0.0))
    recording = Recording.create(Facts(name="kept", run=7))
    with spool.Writer(recording.spool_path) as writer:
        writer.append(events.encode(events.RunStarted(attempt=0, at=1.0)))
    server = IngestServer().start()
    try:
        with pytest.raises(ApiError, match="scope `ingest`"):
            sync(recording, server.url, "mlk_without_the_scope", 20)
        (kept,) = leftovers()
        assert sync(kept, server.url, server.token, 20)
    finally:
        server.stop()
    assert leftovers() == [] and [type(event).__name__ for event in server.events(0)] == ["RunStarted", "RunEnded"]
