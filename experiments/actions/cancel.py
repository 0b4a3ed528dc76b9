"""Cancels a run: at once while nobody works on it, else by asking its supervisor."""

from __future__ import annotations

from django.db import transaction

from experiments.actions.transition import StateConflict, locked, transition
from experiments.models import Desired, Run, State


@transaction.atomic
def cancel(run_id: int, *, by: str) -> Run:
    """The run, cancelled or stopping. Again is harmless. Raises StateConflict if it has succeeded or failed."""
    run = locked(run_id)
    if run.state in (State.CANCELLED, State.STOPPING):
        return run
    if run.is_terminal:
        raise StateConflict(run, "be cancelled")
    idle = run.state in (State.QUEUED, State.PAUSED)
    transition(run, State.CANCELLED if idle else State.STOPPING, by=by, asked="be cancelled", reason="cancelled", desired=Desired.CANCEL)
    return run
