"""Submits a run: one transaction writes it with its first transition; after the commit the workers' bell is rung."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.contrib.auth.models import User
from django.db import transaction
from django.db.models import QuerySet

from experiments.actions.describe import check
from experiments.actions.start import origin, settled
from experiments.actions.transition import first_transition
from experiments.doorbell import ring_after_commit
from experiments.models import Project, Run
from spec.experiment import ExperimentSpec


@transaction.atomic
def submit(
    *,
    user: User,
    project: Project,
    spec: ExperimentSpec,
    runs: QuerySet[Run] | None = None,
    name: str | None = None,
    tags: Sequence[str] = (),
    notes: str = "",
    priority: int = 0,
    parent: Run | None = None,
    resume_from: dict[str, Any] | None = None,
) -> Run:
    """A queued run of `spec`, which is named `name` or as the spec is. Raises Refused (a problem list) before anything is written.

    `runs` are those whose weights it may start from: what who asks may see; without them none. The one that it starts from is its
    parent, unless another is.
    """
    spec = spec.model_copy(update={"name": name}) if name else spec
    cost = check(spec)
    begun_from = origin(spec, Run.objects.none() if runs is None else runs)
    spec = settled(spec, begun_from)
    moe = spec.model.moe
    run = Run.objects.create(
        project=project,
        owner=user,
        name=spec.name,
        spec=spec.model_dump(mode="json"),
        world_size=spec.parallel.world_size,
        node_count=spec.parallel.nodes,
        device=spec.parallel.device,
        tags=list(tags),
        notes=notes,
        priority=priority,
        parent=parent or (begun_from.run if begun_from else None),
        resume_from=resume_from,
        steps=spec.training.steps,
        tokens_per_step=cost.tokens_per_step,
        total_params=cost.total_params,
        active_params=cost.active_params.with_embeddings,
        moe_layers=list(spec.model.moe_layers()),
        n_experts=moe.n_experts if moe else 0,
        top_k=moe.top_k if moe else 0,
    )
    first_transition(run, by=f"user:{user.get_username()}")
    ring_after_commit()
    return run
