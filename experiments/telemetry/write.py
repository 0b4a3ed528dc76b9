"""Telemetry into the store: one transaction for each frame, whole or not at all, and any number of times.

A frame's records continue an attempt's spool. The cursor of that spool moves in the same transaction as what the records
say: after a crash of the database that lost the newest commits, the sender is told the older place and sends again. That
is why the commits of plain steps need not wait for the disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from django.db import connection, transaction

from experiments.models import LIVE, TERMINAL
from experiments.models.telemetry import Event
from experiments.telemetry import batch, copy, payload, rollup, rows, specialisation
from experiments.telemetry.archive import archive_after
from experiments.telemetry.batch import Steps
from spec import events
from spec.events import TENSORS, EventError

__all__ = ["FencedError", "OutOfOrderError", "Stored", "archive_after", "as_json", "ingest", "lock"]

MAX_METRICS = 1000
_Kept = events.RunStarted | events.EvalDone | events.SpikeDetected | events.CheckpointSaved | events.RunEnded


class FencedError(Exception):
    """A later attempt exists, or the run is over: the sender must stop."""


class OutOfOrderError(ValueError):
    """The frame does not continue what the store has."""


@dataclass
class Stored:
    """What a frame added, for those who watch."""

    acked_seq: int
    steps: list[tuple[int, Steps]] = field(default_factory=list)
    """(the run's last step before, the new steps with scalars in the order of `metric_names`)"""
    events: list[dict[str, Any]] = field(default_factory=list)
    rewound_to: int | None = None
    """The step after which everything that a viewer has is no longer so."""
    metric_names: list[str] = field(default_factory=list)
    ended: bool = False


def ingest(
    run_id: int,
    attempt: int,
    first_seq: int,
    payloads: Sequence[memoryview],
    *,
    holder: int | None = None,
    before_end: Callable[[], None] | None = None,
) -> Stored:
    """Stores the records `first_seq`, `first_seq`+1 … of `attempt`'s spool, sent by the supervisor of attempt `holder`. `before_end` is called in
    this transaction before the attempt ends, while the run is still its own.

    Raises FencedError, OutOfOrderError, or EventError for a record that is not an event; nothing is stored then.
    """
    with transaction.atomic():
        run = lock(run_id, attempt if holder is None else holder)
        if attempt > run.attempt:
            raise OutOfOrderError(f"attempt {attempt} does not exist")
        cursor = _cursor(run_id, attempt)
        if first_seq > cursor.acked_seq + 1:
            raise OutOfOrderError(f"record {first_seq} of attempt {attempt} came before record {cursor.acked_seq + 1}")
        known = cursor.acked_seq + 1 - first_seq
        frame = _Frame(run, cursor, before_end)
        frame.store(list(batch.decode(payloads[known:], first_seq + known)))
        return frame.stored


@dataclass
class Locked:
    """What a frame may change of the run's row, and what it must know of it."""

    pk: int
    attempt: int
    last_step: int
    metric_names: list[str]
    summary: dict[str, Any]
    tokens_per_s: float | None
    best_val_loss: float | None
    spikes: int


@dataclass
class Cursor:
    """An attempt's spool cursor; `floor` is the last of its steps that counts, where a later attempt has gone on from a checkpoint."""

    attempt: int
    acked_seq: int = 0
    metric_index: list[int] = field(default_factory=list)
    started: bool = False
    resumed_from_step: int | None = None
    floor: int | None = None


# Plain SQL: these four statements run for each frame of each run, and the ORM took three quarters of a small frame's time.
_LOCK = """
SELECT id, attempt, last_step, metric_names, summary::text, tokens_per_s, best_val_loss, spikes, state, recorded
FROM experiments_run WHERE id = %s FOR NO KEY UPDATE
"""
_CURSOR = """
SELECT attempt, acked_seq, metric_index, started, resumed_from_step,
  (SELECT min(COALESCE(resumed_from_step, -1)) FROM experiments_spoolcursor WHERE run_id = c.run_id AND attempt > c.attempt AND started)
FROM experiments_spoolcursor c WHERE run_id = %s AND attempt = %s
"""
_FLOOR = "SELECT min(COALESCE(resumed_from_step, -1)) FROM experiments_spoolcursor WHERE run_id = %s AND attempt > %s AND started"
_SAVE_RUN = """
UPDATE experiments_run SET last_step = %s, metric_names = %s, summary = %s::jsonb, tokens_per_s = %s, best_val_loss = %s, spikes = %s
WHERE id = %s
"""
_SAVE_CURSOR = """
INSERT INTO experiments_spoolcursor (run_id, attempt, acked_seq, log_offset, metric_index, started, resumed_from_step)
VALUES (%s, %s, %s, 0, %s, %s, %s) ON CONFLICT (run_id, attempt) DO UPDATE SET
  acked_seq = EXCLUDED.acked_seq, metric_index = EXCLUDED.metric_index, started = EXCLUDED.started, resumed_from_step = EXCLUDED.resumed_from_step
"""


def lock(run_id: int, holder: int) -> Locked:
    """The run's row, locked until the transaction ends. Raises FencedError unless `holder` is its attempt and may write."""
    found = rows.query(_LOCK, [run_id])
    if not found:
        raise FencedError
    *kept, state, recorded = found[0]
    if kept[1] != holder or state in TERMINAL or not (recorded or state in LIVE):
        raise FencedError
    kept[4] = json.loads(kept[4])
    return Locked(*kept)


def _cursor(run_id: int, attempt: int) -> Cursor:
    """Read after the lock, in a statement of its own: the one that waited for the lock sees other rows as they were before."""
    found = rows.query(_CURSOR, [run_id, attempt])
    return Cursor(*found[0]) if found else Cursor(attempt, floor=rows.query(_FLOOR, [run_id, attempt])[0][0])


class _Frame:
    """One frame's way into the store; `run` is locked."""

    def __init__(self, run: Locked, cursor: Cursor, before_end: Callable[[], None] | None = None) -> None:
        self.run, self.cursor, self._before_end = run, cursor, before_end
        self.stored = Stored(cursor.acked_seq)
        self._floor = cursor.floor

    def store(self, items: Sequence[tuple[int, Steps | batch.ClosedEvent]]) -> None:
        if all(isinstance(item, Steps) for _, item in items):
            rows.execute("SET LOCAL synchronous_commit = off", [])
        for seq, item in items:
            if isinstance(item, Steps):
                self._steps(item)
            else:
                self._event(seq, item)
            self.cursor.acked_seq = self.stored.acked_seq = seq
        run, cursor = self.run, self.cursor
        said = [run.last_step, run.metric_names, json.dumps(run.summary), run.tokens_per_s, run.best_val_loss, run.spikes]
        rows.execute(_SAVE_RUN, [*said, run.pk])
        place = [run.pk, cursor.attempt, cursor.acked_seq, cursor.metric_index, cursor.started, cursor.resumed_from_step]
        rows.execute(_SAVE_CURSOR, place)
        self.stored.metric_names = run.metric_names

    def _steps(self, steps: Steps) -> None:
        steps = self._named(steps)
        if self._floor is not None:
            beyond = steps.step > self._floor
            self._archive(steps.take(beyond))
            steps = steps.take(~beyond)
        previous = self.run.last_step
        steps = self._new(steps, previous)
        if not len(steps):
            return
        with connection.cursor() as cursor:
            copy.into(cursor, "stepscalar", "run_id, step, at, attempt, vals", copy.scalar_rows(self.run.pk, self.cursor.attempt, steps))
            if tensors := _tensor_rows(self.run.pk, steps):
                copy.into(cursor, "steptensor", "run_id, kind, step, shape, payload", tensors)
        self.run.last_step = max(previous, int(steps.step[-1]))
        rollup.close(self.run.pk, len(self.run.metric_names), steps, previous, self.run.last_step)
        self._summarise(steps)
        self.stored.steps.append((previous, steps))

    def _named(self, steps: Steps) -> Steps:
        """`steps` with their scalars in the order of the run's metric names."""
        index, width = self.cursor.metric_index, len(self.run.metric_names)
        if steps.scalars.shape[1] != len(index):
            raise EventError(f"step {steps.step[0]} has {steps.scalars.shape[1]} scalars; {len(index)} were declared")
        if index == list(range(width)):
            return steps
        scalars = np.full((len(steps), width), np.nan, np.float32)
        scalars[:, index] = steps.scalars
        return Steps(steps.step, steps.at, scalars, steps.tensors)

    def _new(self, steps: Steps, previous: int) -> Steps:
        """Those of `steps` that the store does not have."""
        old = steps.step[steps.step <= previous]
        if not len(old):
            return steps
        found = rows.query("SELECT step FROM experiments_stepscalar WHERE run_id = %s AND step = ANY(%s)", [self.run.pk, old.tolist()])
        return steps.take(~np.isin(steps.step, np.array([row[0] for row in found], np.int64)))

    def _archive(self, steps: Steps) -> None:
        sql = "SELECT step FROM experiments_archivedscalar WHERE run_id = %s AND attempt = %s AND step = ANY(%s)"
        found = rows.query(sql, [self.run.pk, self.cursor.attempt, steps.step.tolist()])
        steps = steps.take(~np.isin(steps.step, np.array([row[0] for row in found], np.int64)))
        if not len(steps):
            return
        with connection.cursor() as cursor:
            copy.into(cursor, "archivedscalar", "run_id, step, at, attempt, vals", copy.scalar_rows(self.run.pk, self.cursor.attempt, steps))
            if tensors := _tensor_rows(self.run.pk, steps, self.cursor.attempt):
                copy.into(cursor, "archivedtensor", "run_id, attempt, kind, step, shape, payload", tensors)

    def _summarise(self, steps: Steps) -> None:
        """The newest value of each metric that has one."""
        summary = dict(self.run.summary)
        known = np.isfinite(steps.scalars)
        newest = len(steps) - 1 - np.argmax(known[::-1], axis=0)
        for column, name in enumerate(self.run.metric_names):
            if known[newest[column], column]:
                summary[name] = float(steps.scalars[newest[column], column])
            elif not np.isnan(steps.scalars[-1, column]):
                summary[name] = None
        self.run.summary = summary
        self.run.tokens_per_s = summary.get("tokens_per_s", self.run.tokens_per_s)

    def _event(self, seq: int, event: batch.ClosedEvent) -> None:
        run, attempt = self.run, self.cursor.attempt
        if isinstance(event, events.MetricsDeclared):
            self._declare(event.names)
            return
        if isinstance(event, events.SpecialisationCounted):
            specialisation.keep(run.pk, attempt, event)
            return
        # The engine's modules import this package.
        from experiments.actions import attempt as engine

        if isinstance(event, events.RunStarted):
            self._start(event)
            if attempt == run.attempt:
                engine.start_attempt(run.pk, attempt, event)
        elif isinstance(event, events.EvalDone):
            run.best_val_loss = event.loss if run.best_val_loss is None else min(event.loss, run.best_val_loss)
            run.summary = {**run.summary, "val_loss": event.loss}
        elif isinstance(event, events.SpikeDetected):
            run.spikes += 1
        elif isinstance(event, events.CheckpointSaved):
            engine.record_checkpoint(run.pk, attempt, event)
        elif isinstance(event, events.RunEnded) and attempt == run.attempt:
            if self._before_end is not None:
                self._before_end()
            engine.end_attempt(run.pk, attempt, event)
            self.stored.ended = True
        self._keep(seq, event)

    def _declare(self, names: Sequence[str]) -> None:
        if len(set(names)) != len(names) or any(not 0 < len(name) <= 200 for name in names):
            raise EventError("metrics_declared: names must differ and have 1 to 200 characters")
        known = {name: i for i, name in enumerate(self.run.metric_names)}
        fresh = [name for name in names if name not in known]
        if len(known) + len(fresh) > MAX_METRICS:
            raise EventError(f"metrics_declared: the run would have {len(known) + len(fresh)} metrics; the limit is {MAX_METRICS}")
        self.run.metric_names = [*self.run.metric_names, *fresh]
        known.update({name: i for i, name in enumerate(fresh, len(known))})
        self.cursor.metric_index = [known[name] for name in names]

    def _start(self, event: events.RunStarted) -> None:
        run, attempt = self.run, self.cursor.attempt
        self.cursor.started, self.cursor.resumed_from_step = True, event.resumed_from_step
        after = -1 if event.resumed_from_step is None else event.resumed_from_step
        last = archive_after(run.pk, after, attempt)
        if last is not None:
            self.stored.rewound_to = last if self.stored.rewound_to is None else min(last, self.stored.rewound_to)
            run.last_step = last

    def _keep(self, seq: int, event: _Kept) -> None:
        body = event.model_dump(exclude={"event", "step", "at"})
        kept = Event(
            run_id=self.run.pk,
            attempt=self.cursor.attempt,
            seq=seq,
            kind=event.event,
            step=getattr(event, "step", None),
            at=datetime.fromtimestamp(getattr(event, "at", 0.0), UTC),
            body=body,
        )
        kept.save(force_insert=True)
        self.stored.events.append(as_json(kept))


def as_json(event: Event) -> dict[str, Any]:
    """The event as REST and the live socket show it."""
    return {
        "id": event.pk,
        "attempt": event.attempt,
        "seq": event.seq,
        "kind": event.kind,
        "step": event.step,
        "at": event.at.isoformat().replace("+00:00", "Z"),
        "body": event.body,
    }


def _tensor_rows(run_id: int, steps: Steps, archived_attempt: int | None = None) -> bytes:
    """COPY rows of all tensors of `steps`, for the live table or the archive."""
    parts = []
    for tensor in steps.tensors:
        code, shape = TENSORS[tensor.kind].code, tensor.values.shape[1:]
        numbers = steps.step[tensor.rows].tolist()
        packed = payload.encode_rows(tensor.values)
        if archived_attempt is None:
            parts.append(copy.tensor_rows(copy.STEP_TENSOR, [(5, 8, run_id, 2, code, 4, step) for step in numbers], shape, packed))
        else:
            keys = [(6, 8, run_id, 4, archived_attempt, 2, code, 4, step) for step in numbers]
            parts.append(copy.tensor_rows(copy.ARCHIVED_TENSOR, keys, shape, packed))
    return b"".join(parts)
