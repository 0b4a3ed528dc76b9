"""A run, what happened to it, and what it left behind. Only `experiments.actions.transition` writes `state`."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib.postgres.fields import ArrayField
from django.contrib.postgres.indexes import GinIndex
from django.db import models
from django.db.models import Q
from django.db.models.expressions import Case, When
from django.db.models.fields.json import KT
from django.db.models.functions import Cast

from experiments.models.project import Project
from experiments.models.worker import Worker


class State(models.TextChoices):
    """Where a run stands. Why it stands there is its `reason`."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
HAS_ORIGIN = Q(progress_checkpoint_step__gt=0) | Q(begins_with__isnull=False)
"""Runs that go on from a checkpoint of their own, or begin with another run's."""
LIVE = frozenset({State.STARTING, State.RUNNING, State.PAUSING, State.STOPPING})
"""States in which an attempt holds a lease."""


class Desired(models.TextChoices):
    """What the run's owner wants of its supervisor."""

    RUN = "run"
    CANCEL = "cancel"
    PAUSE = "pause"


def _named(what: str, field: models.Field[Any, Any]) -> Case:
    """`run` or `step` of the checkpoint of another run that a run begins with."""
    resumed = When(resume_from__isnull=False, then=Cast(KT(f"resume_from__{what}"), field))
    return Case(resumed, default=Cast(KT(f"spec__start__{what}"), field))


class Run(models.Model):
    """One experiment, from its submission to its end.

    `attempt` counts claims and fences every write of the worker; `attempt_token_sha256s[i]` is the hash of attempt i+1's
    token. A `recorded` run comes from an outside trainer: it has no spec, no worker, and is attempt 0 for ever.
    `begins_with`, `begins_at`: number and step of the run whose checkpoint it begins from; columns of their own, since claims look through the queue.
    Of a run on `node_count` > 1 hosts `worker` and `devices` are those of node 0; every host has a Node.
    """

    project = models.ForeignKey(Project, models.PROTECT, related_name="runs")
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, related_name="runs")
    name = models.CharField(max_length=200)
    spec: models.JSONField[dict[str, Any]] = models.JSONField(default=dict)
    recorded = models.BooleanField(default=False)
    world_size = models.IntegerField(default=1)
    node_count = models.IntegerField(default=1)
    device = models.CharField(max_length=8, default="auto")

    state = models.CharField(max_length=16, choices=State, default=State.QUEUED)
    reason = models.CharField(max_length=64, default="", blank=True)
    detail = models.TextField(default="", blank=True)
    exit_code = models.IntegerField(null=True)
    signal = models.IntegerField(null=True)
    desired = models.CharField(max_length=8, choices=Desired, default=Desired.RUN)
    checkpoint_requests = models.IntegerField(default=0)

    attempt = models.IntegerField(default=0)
    attempt_token_sha256s = ArrayField(models.CharField(max_length=64), default=list)
    attempts_without_progress = models.IntegerField(default=0)
    attempts_not_taken = models.IntegerField(default=0)
    progress_checkpoint_step = models.IntegerField(default=0)
    lease_until = models.DateTimeField(null=True)
    worker = models.ForeignKey(Worker, models.SET_NULL, null=True, related_name="runs")
    devices = ArrayField(models.CharField(max_length=64), default=list)
    device_names = ArrayField(models.CharField(max_length=200), default=list)

    parent = models.ForeignKey("self", models.SET_NULL, null=True, related_name="children")
    resume_from: models.JSONField[dict[str, Any] | None] = models.JSONField(null=True)
    begins_with = models.GeneratedField(
        expression=_named("run", models.BigIntegerField()), output_field=models.BigIntegerField(null=True), db_persist=True
    )
    begins_at = models.GeneratedField(expression=_named("step", models.IntegerField()), output_field=models.IntegerField(null=True), db_persist=True)
    tags = ArrayField(models.CharField(max_length=64), default=list)
    notes = models.TextField(default="", blank=True)
    starred = models.BooleanField(default=False)
    archived = models.BooleanField(default=False)
    priority = models.IntegerField(default=0)

    created_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True)
    ended_at = models.DateTimeField(null=True)
    updated_at = models.DateTimeField(auto_now=True)

    resumed_from_step = models.IntegerField(null=True)
    steps = models.IntegerField(default=0)
    last_step = models.IntegerField(default=0)
    tokens_per_s = models.FloatField(null=True)
    tokens_per_step = models.BigIntegerField(default=0)
    summary: models.JSONField[dict[str, Any]] = models.JSONField(default=dict)
    best_val_loss = models.FloatField(null=True)
    spikes = models.IntegerField(default=0)
    total_params = models.BigIntegerField(default=0)
    active_params = models.BigIntegerField(default=0)
    moe_layers = ArrayField(models.IntegerField(), default=list)
    n_experts = models.IntegerField(default=0)
    top_k = models.IntegerField(default=0)
    phases = ArrayField(models.CharField(max_length=200), default=list)
    balance_terms = ArrayField(models.CharField(max_length=200), default=list)
    metric_names = ArrayField(models.CharField(max_length=200), default=list)
    ops: models.JSONField[dict[str, str]] = models.JSONField(default=dict)
    versions: models.JSONField[dict[str, str]] = models.JSONField(default=dict)
    log_size = models.BigIntegerField(default=0)

    class Meta:
        constraints = [
            models.CheckConstraint(condition=models.Q(state__in=State.values), name="run_state_known"),
            models.CheckConstraint(condition=models.Q(desired__in=Desired.values), name="run_desired_known"),
        ]
        indexes = [
            models.Index(fields=["-created_at", "-id"], name="run_newest"),
            models.Index(fields=["project", "-created_at", "-id"], name="run_newest_of_project"),
            models.Index(fields=["-priority", "created_at", "id"], name="run_queue", condition=models.Q(state="queued")),
            models.Index(fields=["-priority", "created_at", "id"], name="run_queue_wide", condition=models.Q(state="queued", node_count__gt=1)),
            models.Index(fields=["-priority", "created_at", "id"], name="run_queue_origin", condition=models.Q(state="queued") & HAS_ORIGIN),
            models.Index(fields=["lease_until"], name="run_leases", condition=models.Q(lease_until__isnull=False)),
            GinIndex(fields=["tags"], name="run_tags"),
        ]

    def __str__(self) -> str:
        return f"run {self.pk} {self.name}"

    @property
    def is_terminal(self) -> bool:
        """Whether its state can never change again."""
        return self.state in TERMINAL

    @property
    def is_live(self) -> bool:
        """Whether an attempt holds devices."""
        return self.state in LIVE


class Transition(models.Model):
    """One change of a run's state: who made it and why. The first row of a run has an empty `from_state`."""

    run = models.ForeignKey(Run, models.CASCADE, related_name="transitions")
    at = models.DateTimeField(auto_now_add=True)
    from_state = models.CharField(max_length=16, blank=True)
    to_state = models.CharField(max_length=16)
    by = models.CharField(max_length=200)
    reason = models.CharField(max_length=64, default="", blank=True)
    detail = models.TextField(default="", blank=True)
    attempt = models.IntegerField()

    class Meta:
        indexes = [models.Index(fields=["run", "id"], name="transition_of_run")]

    def __str__(self) -> str:
        return f"run {self.run_id}: {self.from_state or 'new'} → {self.to_state}"


class Checkpoint(models.Model):
    """A checkpoint on the disk of `host`. `sha256` is its manifest's; `deleted` once newer ones replaced it, or the run went on without it.

    `storage` is the URL of the storage that has a copy ("" for none), `storage_problem` why the newest one has none.
    """

    run = models.ForeignKey(Run, models.CASCADE, related_name="checkpoints")
    attempt = models.IntegerField()
    step = models.IntegerField()
    path = models.TextField()
    size_bytes = models.BigIntegerField()
    sha256 = models.CharField(max_length=64)
    seconds = models.FloatField()
    at = models.DateTimeField()
    deleted = models.BooleanField(default=False)
    host = models.CharField(max_length=200, default="", blank=True)
    storage = models.CharField(max_length=500, default="", blank=True)
    storage_problem = models.CharField(max_length=500, default="", blank=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["run", "attempt", "step"], name="one_checkpoint_per_attempt_step")]

    def __str__(self) -> str:
        return f"run {self.run_id} at step {self.step}"


class IdempotencyKey(models.Model):
    """A client's name for one submission, so that sending it again makes no second run."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="+")
    key = models.CharField(max_length=200)
    body_sha256 = models.CharField(max_length=64)
    run = models.ForeignKey(Run, models.CASCADE, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["user", "key"], name="one_run_per_idempotency_key")]

    def __str__(self) -> str:
        return self.key
