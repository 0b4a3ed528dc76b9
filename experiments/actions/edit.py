"""Changes what people write about a run."""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.db.models.functions import Now

from experiments.actions.transition import locked
from experiments.live.publish import publish_run
from experiments.models import Run


@transaction.atomic
def edit(run_id: int, **fields: Any) -> Run:
    """The run with its name, notes, tags, starred, archived or priority changed. Raises Run.DoesNotExist."""
    run = locked(run_id)
    if fields:
        Run.objects.filter(pk=run_id).update(**fields, updated_at=Now())
        publish_run(run_id)
        run.refresh_from_db()
    return run
