"""Deletes a run that has ended, with everything it recorded."""

from __future__ import annotations

from django.db import transaction

from experiments.actions.transition import StateConflict, locked


@transaction.atomic
def delete(run_id: int) -> None:
    """Raises StateConflict unless it has ended."""
    run = locked(run_id)
    if not run.is_terminal:
        raise StateConflict(run, "be deleted before it has ended")
    run.delete()
