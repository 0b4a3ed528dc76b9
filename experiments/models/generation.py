"""Text that a run's checkpoint was asked to write, and which experts wrote it. Only the actions of generations write `state`."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib.postgres.fields import ArrayField
from django.db import models

from experiments.models.run import Run
from experiments.models.worker import Worker


class GenerationState(models.TextChoices):
    """Where a generation stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class Generation(models.Model):
    """A prompt, how to go on from it, and what came of it.

    `wanted_step` is the checkpoint that was asked for (null: the newest), `step` the one that was taken. `attempt` counts claims
    and fences what a worker says; `not_here` are the workers that do not have the checkpoint on their disk.
    """

    run = models.ForeignKey(Run, models.CASCADE, related_name="generations")
    creator = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, related_name="+")
    prompt = models.TextField(blank=True)
    parameters: models.JSONField[dict[str, Any]] = models.JSONField()
    wanted_step = models.IntegerField(null=True)
    step = models.IntegerField(null=True)

    state = models.CharField(max_length=16, choices=GenerationState, default=GenerationState.QUEUED)
    reason = models.CharField(max_length=64, default="", blank=True)
    detail = models.TextField(default="", blank=True)
    result: models.JSONField[dict[str, Any] | None] = models.JSONField(null=True)

    attempt = models.IntegerField(default=0)
    lease_until = models.DateTimeField(null=True)
    worker = models.ForeignKey(Worker, models.SET_NULL, null=True, related_name="+")
    not_here = ArrayField(models.IntegerField(), default=list)

    idempotency_key = models.CharField(max_length=200, null=True)  # noqa: DJ001  no key is not the key ""
    body_sha256 = models.CharField(max_length=64, default="")

    created_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True)
    ended_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.CheckConstraint(condition=models.Q(state__in=GenerationState.values), name="generation_state_known"),
            models.UniqueConstraint(fields=["creator", "idempotency_key"], name="one_generation_per_idempotency_key"),
        ]
        indexes = [
            models.Index(fields=["run", "-id"], name="generation_of_run"),
            models.Index(fields=["id"], name="generation_waiting", condition=models.Q(state__in=["queued", "running"])),
        ]

    def __str__(self) -> str:
        return f"generation {self.pk} of run {self.run_id}"
