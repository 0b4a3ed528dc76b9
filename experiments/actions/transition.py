"""The state machine of a run. Nothing else writes `state`.

queued → starting → running → succeeded | failed | cancelled
           running ⇄ pausing → paused → queued;   starting, running, pausing → stopping → cancelled
           a live run whose attempt is lost goes back to queued
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.db import transaction
from django.db.models.functions import Now

from experiments.live.publish import publish_run
from experiments.models import LIVE, TERMINAL, Run, State, Transition

_ENDS = frozenset(TERMINAL)
ALLOWED: Mapping[str, frozenset[str]] = {
    State.QUEUED: frozenset({State.STARTING, State.PAUSED, State.CANCELLED}),
    State.STARTING: frozenset({State.RUNNING, State.PAUSING, State.PAUSED, State.STOPPING, State.QUEUED}) | _ENDS,
    State.RUNNING: frozenset({State.PAUSING, State.PAUSED, State.STOPPING, State.QUEUED}) | _ENDS,
    State.PAUSING: frozenset({State.RUNNING, State.PAUSED, State.STOPPING, State.QUEUED}) | _ENDS,
    State.PAUSED: frozenset({State.QUEUED, State.CANCELLED}),
    State.STOPPING: _ENDS,
    **{state: frozenset() for state in TERMINAL},
}
_VERBS: Mapping[str, list[str]] = {
    State.QUEUED: ["pause", "cancel"],
    State.STARTING: ["checkpoint", "pause", "cancel"],
    State.RUNNING: ["checkpoint", "pause", "cancel"],
    State.PAUSING: ["resume", "cancel"],
    State.PAUSED: ["resume", "cancel"],
    State.STOPPING: [],
}


def possible(run: Run) -> list[str]:
    """What a person can do with the run as it is; what is harmless since it is so already is left out."""
    verbs = _VERBS.get(run.state, ["restart", "delete"])
    return [verb for verb in verbs if verb in ("cancel", "delete")] if run.recorded else [*verbs, "clone"]


class StateConflict(Exception):  # noqa: N818
    """The run's state does not allow it; the text says which state, what was asked, and what is possible instead."""

    def __init__(self, run: Run, asked: str, instead: str = "") -> None:
        verbs = [f"{verb} (an administrator of the project)" if verb == "delete" else verb for verb in possible(run)]
        super().__init__(f"run {run.pk} is {run.state}: it cannot {asked}; {instead or 'possible now: ' + (', '.join(verbs) or 'nothing')}")
        self.state = run.state


def locked(run_id: int) -> Run:
    """The run, its row locked until the transaction ends. Raises Run.DoesNotExist."""
    return Run.objects.select_for_update().get(pk=run_id)


def transition(run: Run, to: str, *, by: str, asked: str = "", reason: str = "", detail: str = "", **fields: Any) -> None:
    """Moves `run` from the state that the caller read to `to`, writes `fields` with it, and updates the instance.

    Compare-and-set on state and attempt: raises StateConflict if the machine has no such arrow, or if the row has moved
    on since it was read. `by` names who did it: `user:ada`, `worker:gpu1`, `supervisor`, `reconciler`.
    """
    before, now = run.state, Now()
    changes: dict[str, Any] = {"state": to, "reason": reason, "detail": detail, "updated_at": now, **fields}
    if to in TERMINAL:
        changes["ended_at"] = now
    if to not in LIVE:
        changes["lease_until"] = None
    with transaction.atomic():
        mine = Run.objects.filter(pk=run.pk, state=before, attempt=run.attempt)
        if to not in ALLOWED[before] or not mine.update(**changes):
            raise StateConflict(run, asked or f"become {to}")
        run.refresh_from_db()
        Transition.objects.create(run=run, from_state=before, to_state=to, by=by, reason=reason, detail=detail, attempt=run.attempt)
        publish_run(run.pk)


def first_transition(run: Run, *, by: str) -> None:
    """The row that begins a run's history: it was created in its present state."""
    Transition.objects.create(run=run, from_state="", to_state=run.state, by=by, attempt=run.attempt)
    publish_run(run.pk)
