"""Begins a run that an outside trainer makes and `moelab.Recorder` reports: no spec, no worker, attempt 0 for ever."""

from __future__ import annotations

from collections.abc import Sequence

from django.contrib.auth.models import User
from django.db import transaction
from django.db.models.functions import Now

from experiments.actions.transition import first_transition
from experiments.models import Project, Run, State


@transaction.atomic
def record(*, user: User, project: Project, name: str, tags: Sequence[str] = (), notes: str = "") -> Run:
    """A running run without a lease: its spool may arrive live, or be sent long after it has ended."""
    run = Run(project=project, owner=user, name=name, tags=list(tags), notes=notes, recorded=True, state=State.RUNNING)
    run.save()
    Run.objects.filter(pk=run.pk).update(started_at=Now())
    run.refresh_from_db()
    first_transition(run, by=f"user:{user.get_username()}")
    return run
