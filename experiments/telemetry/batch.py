"""Records as they arrive, gathered into batches of steps with the closed events in their places between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spec import events
from spec.events import EventError, StepDone

Array = NDArray[Any]
ClosedEvent = (
    events.RunStarted
    | events.MetricsDeclared
    | events.EvalDone
    | events.SpikeDetected
    | events.CheckpointSaved
    | events.RunEnded
    | events.SpecialisationCounted
)


@dataclass(frozen=True)
class TensorRows:
    """Tensors of one kind and shape: `rows` are their places in the batch, `values` is [len(rows), *shape]."""

    kind: str
    rows: NDArray[np.int64]
    values: Array

    def take(self, keep: NDArray[np.bool_]) -> TensorRows:
        """Those of the batch's rows that `keep` marks, with their places after the others are gone."""
        mine = keep[self.rows]
        return TensorRows(self.kind, (np.cumsum(keep) - 1)[self.rows[mine]], self.values[mine])


@dataclass(frozen=True)
class Steps:
    """N steps in a row: `step` int64[N] in rising order, `at` float64[N] Unix seconds, `scalars` float32[N, S]."""

    step: NDArray[np.int64]
    at: NDArray[np.float64]
    scalars: NDArray[np.float32]
    tensors: list[TensorRows] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.step)

    def take(self, keep: NDArray[np.bool_]) -> Steps:
        """The steps that `keep` (bool[N]) marks."""
        if keep.all():
            return self
        tensors = [part for part in (tensor.take(keep) for tensor in self.tensors) if len(part.rows)]
        return Steps(self.step[keep], self.at[keep], self.scalars[keep], tensors)


def join(parts: Sequence[Steps]) -> Steps:
    """Stretches of steps that follow each other, with as many scalars each, as one."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part) for part in parts)])
    tensors = [
        TensorRows(tensor.kind, tensor.rows + start, tensor.values) for part, start in zip(parts, starts, strict=False) for tensor in part.tensors
    ]
    step, at, scalars = (np.concatenate([getattr(part, name) for part in parts]) for name in ("step", "at", "scalars"))
    return Steps(step, at, scalars, tensors)


def decode(payloads: Sequence[memoryview], first_seq: int) -> Iterator[tuple[int, Steps | ClosedEvent]]:
    """(sequence number, event) of each closed event, and (sequence number of the last, Steps) for each stretch of steps.

    Raises EventError for a record that is not an event, or steps that do not have the same number of scalars.
    """
    waiting: list[StepDone] = []
    for seq, payload in enumerate(payloads, first_seq):
        event = events.decode(payload)
        if isinstance(event, StepDone):
            if waiting and len(event.scalars) != len(waiting[0].scalars):
                raise EventError(f"step {event.step} has {len(event.scalars)} scalars, the step before has {len(waiting[0].scalars)}")
            waiting.append(event)
            continue
        if waiting:
            yield seq - 1, gather(waiting)
            waiting = []
        yield seq, event
    if waiting:
        yield first_seq + len(payloads) - 1, gather(waiting)


def gather(done: Sequence[StepDone]) -> Steps:
    """`done` as arrays, in the order of steps; of two with the same step the first counts."""
    numbers, first = np.unique(np.fromiter((event.step for event in done), np.int64, len(done)), return_index=True)
    ordered = [done[i] for i in first]
    at = np.fromiter((event.at for event in ordered), np.float64, len(ordered))
    groups: dict[tuple[str, tuple[int, ...]], tuple[list[int], list[Array]]] = {}
    for row, event in enumerate(ordered):
        for kind, array in event.tensors.items():
            if array.size:
                rows, arrays = groups.setdefault((kind, array.shape), ([], []))
                rows.append(row)
                arrays.append(array)
    tensors = [TensorRows(kind, np.array(rows), np.stack(arrays)) for (kind, _), (rows, arrays) in groups.items()]
    return Steps(numbers, at, np.stack([event.scalars for event in ordered]), tensors)
