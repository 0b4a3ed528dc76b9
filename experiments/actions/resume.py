"""Lets a paused run go on from its newest checkpoint."""

from __future__ import annotations

from django.db import transaction

from experiments.actions.transition import StateConflict, locked, transition
from experiments.doorbell import ring_after_commit
from experiments.models import Desired, Run, State


@transaction.atomic
def resume(run_id: int, *, by: str) -> Run:
    """The run, queued again; one that is still pausing just goes on. Raises StateConflict unless it is pausing, paused or going already."""
    run = locked(run_id)
    if run.desired == Desired.RUN and run.state in (State.QUEUED, State.STARTING, State.RUNNING):
        return run
    if run.state == State.PAUSING:
        # Its supervisor may have begun to stop: the attempt then ends as paused, and is queued again (see attempt.end_attempt).
        transition(run, State.RUNNING, by=by, asked="be resumed", desired=Desired.RUN)
    elif run.state == State.PAUSED:
        transition(run, State.QUEUED, by=by, asked="be resumed", desired=Desired.RUN, attempts_without_progress=0, attempts_not_taken=0)
        ring_after_commit()
    else:
        raise StateConflict(run, "be resumed")
    return run
