"""Pauses a run: it saves a checkpoint, gives its devices back, and keeps its place in history."""

from __future__ import annotations

from django.db import transaction

from experiments.actions.transition import StateConflict, locked, transition
from experiments.models import Desired, Run, State


@transaction.atomic
def pause(run_id: int, *, by: str) -> Run:
    """The run, paused (if it was queued) or pausing. Again is harmless. Raises StateConflict in any other state."""
    run = locked(run_id)
    if run.state in (State.PAUSED, State.PAUSING):
        return run
    if run.recorded or run.state not in (State.QUEUED, State.STARTING, State.RUNNING):
        raise StateConflict(run, "be paused" if not run.recorded else "be paused, since an outside trainer makes it")
    to = State.PAUSED if run.state == State.QUEUED else State.PAUSING
    transition(run, to, by=by, asked="be paused", reason="paused", desired=Desired.PAUSE)
    return run
