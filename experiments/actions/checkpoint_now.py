"""Asks a run for a checkpoint after its present step."""

from __future__ import annotations

from django.db import transaction
from django.db.models import F
from django.db.models.functions import Now

from experiments.actions.transition import StateConflict, locked
from experiments.live.publish import publish_run
from experiments.models import Run, State


@transaction.atomic
def checkpoint_now(run_id: int) -> Run:
    """The run, with one more request for its supervisor. Raises StateConflict unless it is starting or running here."""
    run = locked(run_id)
    if run.recorded or run.state not in (State.STARTING, State.RUNNING):
        raise StateConflict(run, "save a checkpoint")
    Run.objects.filter(pk=run.pk).update(checkpoint_requests=F("checkpoint_requests") + 1, updated_at=Now())
    publish_run(run.pk)
    run.refresh_from_db()
    return run
