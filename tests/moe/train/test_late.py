"""Figures that arrive a step late, as from a CUDA device, change nothing of what a run makes and tells, but when."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moe.train import checkpoint
from moe.train.batches import Batches
from moe.train.corpus import load
from moe.train.loader import Loader
from moe.train.ranks import Ranks
from moe.train.stop import NotFinite, Stopped
from spec import events
from tests.moe.parallel.ranks import on_ranks
from tests.moe.train.tiny import HOME, Run, tiny

Start = Callable[..., Run]
SPEEDS = {"tokens_per_s", "step_ms", "tflop_per_s"}
BIASED = {"model": {"dropout": 0.1, "moe": {"n_experts": 4, "top_k": 2, "d_expert": 32, "balance": [{"kind": "loss_free_bias"}]}}}


class Stream:
    """The order in which steps were made ("+n") and read ("n")."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.made = 0

    def reading(self) -> type:
        """A reader of a device that is at work when its calls return: what is read is what was there when the copy was begun."""
        stream = self

        class Copy:
            late: ClassVar[bool] = True

            def __init__(self, rows: Tensor) -> None:
                stream.made += 1
                self._step, self._rows = stream.made, rows.clone()
                stream.order.append(f"+{self._step}")
                rows.fill_(-1)  # the stream goes on, and uses the memory again

            def array(self) -> NDArray[np.int32]:
                stream.order.append(str(self._step))
                return self._rows.numpy()

        return Copy


def late(run: Run) -> Stream:
    """Makes the run read its figures late."""
    stream = Stream()
    run.learner.reading = stream.reading()
    return stream


def told(run: Run) -> list[dict[str, Any]]:
    """Everything in the spool but times and speeds."""
    found, names = [], []
    for event in run.events:
        if isinstance(event, events.MetricsDeclared):
            names = event.names
        if isinstance(event, events.StepDone):
            scalars = {name: value for name, value in zip(names, event.scalars.tolist(), strict=True) if name not in SPEEDS}
            tensors = {name: array.tolist() for name, array in event.tensors.items() if name not in ("phase_ms", "part_ms")}
            found.append({"step": event.step, **scalars, **tensors})
        elif isinstance(event, events.EvalDone | events.CheckpointSaved | events.SpikeDetected):
            found.append(event.model_dump(exclude={"at", "path", "seconds", "sha256", "size_bytes"}))
    return found


def state(out: Path, step: int) -> dict[str, Any]:
    return json.loads((out / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


def test_a_late_run_tells_and_keeps_what_a_punctual_one_does(run: Start, tmp_path: Path) -> None:
    punctual, delayed = run(out=tmp_path / "punctual", **BIASED), run(out=tmp_path / "late", **BIASED)
    stream = late(delayed)
    assert punctual.go() == delayed.go()
    assert told(punctual) == told(delayed)
    assert [event["step"] for event in told(delayed) if "loss" in event and "by_domain" not in event] == list(range(1, 13))
    for file, group in punctual.learner.tensors().items():
        assert all(torch.equal(tensor, delayed.learner.tensors()[file][name]) for name, tensor in group.items())
    for step in (4, 8, 12):
        assert state(punctual.out, step) == state(delayed.out, step)
    # Read when the next one is made, but at once before a checkpoint (4, 8), a validation (5, 10) and the end.
    order = "+1 +2 1 +3 2 +4 3 4 +5 5 +6 +7 6 +8 7 8 +9 +10 9 10 +11 +12 11 12"
    assert " ".join(stream.order) == order


def test_a_late_run_stops_and_saves_a_step_later_and_goes_on_bit_identically(run: Start, tmp_path: Path) -> None:
    undisturbed = run(out=tmp_path / "undisturbed", **BIASED)
    undisturbed.go()
    first = run(attempt=1, **BIASED)
    late(first)

    making: list[int] = []
    # Asked as by another rank: nobody here knows before the figures are read.
    first.requests.take = lambda: (making[-1] == 6, making[-1] == 2)  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="after step 7"):
        first.go(making.append)
    assert checkpoint.steps(first.out / "checkpoints") == [3, 4, 7]
    assert [event["step"] for event in told(first) if "grad_norm" in event] == list(range(1, 8))
    second = run(attempt=2, **BIASED)
    late(second)
    second.go()
    steps = {**first.steps(), **second.steps()}
    assert {step: event.scalars[0] for step, event in steps.items()} == {step: event.scalars[0] for step, event in undisturbed.steps().items()}


@pytest.mark.parametrize("poisoned", [7, 8])
def test_a_late_nan_is_told_of_its_own_step_and_never_saved(run: Start, poisoned: int) -> None:
    done = run()
    late(done)

    def poison(step: int) -> None:
        if step == poisoned:
            with torch.no_grad():
                next(done.learner.model.parameters()).fill_(math.nan)

    with pytest.raises(NotFinite, match=f"^step {poisoned}: the loss is nan; the last checkpoint is of step 4$"):
        done.go(poison)
    assert checkpoint.steps(done.out / "checkpoints") == [4]
    assert max(done.steps()) == poisoned


def stopped(out: Path) -> str:
    """How a rank's late run ends when the second one is asked to stop at step 3."""
    rank = dist.get_rank()
    run = Run(
        tiny(training={"steps": 50, "eval_every": 0, "checkpoint_every": 0}, parallel={"data": 2}, **BIASED),
        out,
        ranks=Ranks(rank, 2, torch.device("cpu")),
    )
    late(run)
    try:
        run.go(lambda step: setattr(run.requests, "stop", run.requests.stop or (rank == 1 and step == 3)))
    except Stopped as end:
        return str(end)
    return "went to the end"


def test_all_late_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path, stopped, tmp_path / "run") == ["stopped on request after step 4"] * 2
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4]


def batches() -> Batches:
    made = tiny()
    return Batches(load(made.data, HOME), 32, 8, seed=5)


def test_what_is_prepared_ahead_is_what_is_made_when_asked() -> None:
    ranks = Ranks(1, 2, torch.device("cpu"))
    ahead, asked = Loader(batches(), 2, ranks, ahead=True), Loader(batches(), 2, ranks, ahead=False)
    for step in (1, 2, 3, 7, 8, 2):  # also where a run goes on somewhere else
        pairs = list(ahead.micro_batches(step))
        assert len(pairs) == 2
        for (tokens, targets), wanted in zip(pairs, asked.micro_batches(step), strict=True):
            assert torch.equal(tokens, wanted[0]) and torch.equal(targets, wanted[1])
    ahead.close()
    ahead.close()


def test_what_goes_wrong_ahead_is_raised_where_it_is_asked_for() -> None:
    source = batches()
    ahead = Loader(source, 1, Ranks(0, 1, torch.device("cpu")), ahead=True)
    windows_of = source.windows_of
    source.windows_of = lambda step: windows_of(step) if step < 3 else 1 / 0  # type: ignore[method-assign, assignment, return-value]
    list(ahead.micro_batches(1))
    list(ahead.micro_batches(2))
    with pytest.raises(ZeroDivisionError):
        list(ahead.micro_batches(3))
    ahead.close()
