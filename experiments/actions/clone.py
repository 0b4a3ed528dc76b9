"""Makes a new run from another's spec, with single values changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.contrib.auth.models import User
from django.db.models import QuerySet

from experiments.actions.describe import resolve
from experiments.actions.submit import submit
from experiments.actions.transition import StateConflict
from experiments.models import Run


def clone(run: Run, *, user: User, runs: QuerySet[Run], changes: Mapping[str, Any], name: str | None = None) -> Run:
    """A new queued run whose parent is `run`; `changes` maps dotted paths to values, `runs` are those whose weights it may start from.

    Raises Refused (pointing into `set`) and StateConflict.
    """
    if run.recorded:
        raise StateConflict(run, "be cloned, since an outside trainer made it and there is no spec")
    spec = resolve(run.spec, changes, at="/set", overrides_at="/set")
    return submit(user=user, project=run.project, spec=spec, runs=runs, name=name, tags=run.tags, parent=run)
