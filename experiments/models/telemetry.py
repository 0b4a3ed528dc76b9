"""The telemetry store: what runs said about themselves, at full resolution and rolled up.

One row per step holds all scalars (`vals[i]` belongs to `run.metric_names[i]`); one row per step and kind holds a tensor
(`spec.events.TENSORS`, packed by `experiments.telemetry.payload`). Roll-ups exist for buckets that are over; bucket b of
level w holds the steps b*w+1 … (b+1)*w. Rows are written by `experiments.telemetry.write` alone, which holds a lock on
the run's row; hence no foreign-key triggers, and no row without its run.
"""

# ruff: noqa: DJ008  rows of numbers, which nobody prints
from __future__ import annotations

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper

from experiments.models.run import Run


class RealField(models.FloatField):  # type: ignore[type-arg]  # it takes none at run time
    """PostgreSQL's four-byte float."""

    def db_type(self, connection: BaseDatabaseWrapper) -> str:
        return "real"


def _run() -> models.ForeignKey[Run, Run]:
    return models.ForeignKey(Run, on_delete=models.CASCADE, db_index=False, db_constraint=False, related_name="+")


class StepScalar(models.Model):
    """The scalars of one optimiser step."""

    pk = models.CompositePrimaryKey("run_id", "step")
    run = _run()
    step = models.IntegerField()
    at = models.DateTimeField()
    attempt = models.IntegerField()
    vals = ArrayField(RealField())


class StepTensor(models.Model):
    """One tensor of one optimiser step; `kind` is TensorKind.code."""

    pk = models.CompositePrimaryKey("run_id", "kind", "step")
    run = _run()
    kind = models.SmallIntegerField()
    step = models.IntegerField()
    shape = ArrayField(models.IntegerField())
    payload = models.BinaryField()


class ScalarRollup(models.Model):
    """The scalars of a bucket's steps. `counts[i]` steps had a value that was not NaN; `n` steps are in the bucket."""

    pk = models.CompositePrimaryKey("run_id", "level", "bucket")
    run = _run()
    level = models.SmallIntegerField()
    bucket = models.IntegerField()
    n = models.IntegerField()
    first_step = models.IntegerField()
    last_step = models.IntegerField()
    mins = ArrayField(RealField())
    maxs = ArrayField(RealField())
    sums = ArrayField(models.FloatField())
    counts = ArrayField(models.IntegerField())


class TensorRollup(models.Model):
    """The sum of a bucket's tensors; `n` steps had one."""

    pk = models.CompositePrimaryKey("run_id", "kind", "level", "bucket")
    run = _run()
    kind = models.SmallIntegerField()
    level = models.SmallIntegerField()
    bucket = models.IntegerField()
    n = models.IntegerField()
    shape = ArrayField(models.IntegerField())
    payload = models.BinaryField()


class ArchivedScalar(models.Model):
    """A step that a dead attempt made past the checkpoint its successor went on from."""

    pk = models.CompositePrimaryKey("run_id", "attempt", "step")
    run = _run()
    attempt = models.IntegerField()
    step = models.IntegerField()
    at = models.DateTimeField()
    vals = ArrayField(RealField())


class ArchivedTensor(models.Model):
    """A tensor of such a step."""

    pk = models.CompositePrimaryKey("run_id", "attempt", "kind", "step")
    run = _run()
    attempt = models.IntegerField()
    kind = models.SmallIntegerField()
    step = models.IntegerField()
    shape = ArrayField(models.IntegerField())
    payload = models.BinaryField()


class Event(models.Model):
    """Everything a run said that is not a step. `id` grows within a run in the order of commits: a cursor."""

    id = models.BigAutoField(primary_key=True)
    run = _run()
    attempt = models.IntegerField()
    seq = models.BigIntegerField()
    kind = models.CharField(max_length=40)
    step = models.IntegerField(null=True)
    at = models.DateTimeField()
    body = models.JSONField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["run", "attempt", "seq"], name="event_once")]
        indexes = [models.Index(fields=["run", "id"], name="event_by_run")]

    def __str__(self) -> str:
        return f"{self.kind} of run {self.run_id}"


class Specialisation(models.Model):
    """What each expert took of the text of one validation.

    `classes` and `domains` are lists of [name, tokens]; the payloads are uint32[*shape, class] and uint32[*shape, domain].
    """

    pk = models.CompositePrimaryKey("run_id", "attempt", "step")
    run = _run()
    attempt = models.IntegerField()
    step = models.IntegerField()
    at = models.DateTimeField()
    classes = models.JSONField()
    domains = models.JSONField()
    shape = ArrayField(models.IntegerField())
    class_tokens = models.BinaryField()
    domain_tokens = models.BinaryField()


class SpoolCursor(models.Model):
    """How much of an attempt's spool and log is in the store, and how its scalars map onto the run's names."""

    pk = models.CompositePrimaryKey("run_id", "attempt")
    run = _run()
    attempt = models.IntegerField()
    acked_seq = models.BigIntegerField(default=0)
    log_offset = models.BigIntegerField(default=0)
    metric_index = ArrayField(models.IntegerField(), default=list)
    started = models.BooleanField(default=False)
    resumed_from_step = models.IntegerField(null=True)


class LogChunk(models.Model):
    """A piece of a run's log. `start` counts bytes over all attempts, in the order in which they arrived."""

    pk = models.CompositePrimaryKey("run_id", "start")
    run = _run()
    start = models.BigIntegerField()
    attempt = models.IntegerField()
    data = models.BinaryField()
