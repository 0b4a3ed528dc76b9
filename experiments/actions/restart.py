"""Runs the same experiment again, from step 1."""

from __future__ import annotations

from django.contrib.auth.models import User
from django.db.models import QuerySet

from experiments.actions.submit import submit
from experiments.actions.transition import StateConflict
from experiments.models import Run
from spec.experiment import ExperimentSpec


def restart(run: Run, *, user: User, runs: QuerySet[Run]) -> Run:
    """A new queued run whose parent is `run`. Raises StateConflict unless `run` has ended here.

    Raises Refused if its spec has become too large, or starts from a run that is not among `runs` or has lost its checkpoint.
    """
    if run.recorded or not run.is_terminal:
        raise StateConflict(run, "be restarted")
    return submit(
        user=user,
        project=run.project,
        spec=ExperimentSpec.model_validate(run.spec),
        runs=runs,
        tags=run.tags,
        priority=run.priority,
        parent=run,
    )
