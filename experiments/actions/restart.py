"""Runs the same experiment again, from step 1."""

from __future__ import annotations

from django.contrib.auth.models import User

from experiments.actions.submit import submit
from experiments.actions.transition import StateConflict
from experiments.models import Run
from spec.experiment import ExperimentSpec


def restart(run: Run, *, user: User) -> Run:
    """A new queued run whose parent is `run`. Raises StateConflict unless `run` has ended here; Refused if its spec has become too large."""
    if run.recorded or not run.is_terminal:
        raise StateConflict(run, "be restarted")
    return submit(
        user=user,
        project=run.project,
        spec=ExperimentSpec.model_validate(run.spec),
        tags=run.tags,
        priority=run.priority,
        parent=run,
    )
