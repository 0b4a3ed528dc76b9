"""Where what a run goes on from, or begins with, can be had: on the disk of the host that saved it, its `home`, or from a storage that hosts share.

A run waits for those that have its newest checkpoint while one of them is alive that may take the run. If none is, an older one in a storage is
next, and where none of those has any, whoever takes the run begins anew.

After a fetch that has failed, nobody else fetches while the home lives, unless the failure was the home's own. Who would have to fetch again waits
first: FETCH_AGAIN_S, and twice as long each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from django.db.models import DurationField, ExpressionWrapper, F, OuterRef, Q, QuerySet, Subquery, TextField, Value
from django.db.models.expressions import Case, Combinable, When
from django.db.models.fields.json import KT
from django.db.models.functions import Coalesce, Now, NullIf, Power

from experiments.models import HAS_ORIGIN, Checkpoint, Run, Worker

UNREACHABLE = "checkpoint_unreachable"
"""Why an attempt has ended whose host could not fetch the checkpoint."""
FETCH_AGAIN_S = 15


def with_source(runs: QuerySet[Run]) -> QuerySet[Run]:
    """`runs` with `home`, a host; `shared`, the storage that has the newest checkpoint; `older`, one that has an earlier one. Each is "" for none."""
    own, resumed = Q(progress_checkpoint_step__gt=0), Q(resume_from__isnull=False)
    newest = Checkpoint.objects.filter(run=OuterRef("pk"), deleted=False).order_by("-attempt", "-step")
    stored = Checkpoint.objects.filter(run=OuterRef("pk")).exclude(storage="").order_by("-attempt", "-step")
    begun = Checkpoint.objects.filter(run=OuterRef("begins_with"), step=OuterRef("begins_at")).order_by("deleted", "-attempt")
    holder = Run.objects.filter(pk=OuterRef("begins_with"))
    return runs.annotate(
        home=_text(
            When(own, then=Coalesce(NullIf(Subquery(newest.values("host")[:1]), Value("")), F("worker__host"))),
            When(resumed, then=KT("resume_from__host")),
            default=Coalesce(NullIf(Subquery(begun.values("host")[:1]), Value("")), Subquery(holder.values("worker__host")[:1])),
        ),
        shared=_text(When(own, then=Subquery(newest.values("storage")[:1])), default=Subquery(begun.values("storage")[:1])),
        older=_text(When(own, then=Subquery(stored.values("storage")[:1])), default=Value("")),
    )


def _text(*cases: When, default: Combinable) -> Coalesce:
    return Coalesce(Case(*cases, default=default, output_field=TextField()), Value(""), output_field=TextField())


def bringable(workers: Sequence[Worker], alive: Sequence[Worker]) -> Q:
    """Of runs with their source: those whose checkpoint one of `workers` can bring, or nobody can of those that are `alive` and may have the run.

    Each of the terms costs a look at the checkpoints for each run: the one that most often decides is the first.
    """
    hosts, storages = {worker.host for worker in workers}, {worker.storage for worker in workers} - {""}
    all_hosts, all_storages = {worker.host for worker in alive} | hosts, ({worker.storage for worker in alive} | storages) - {""}
    failed, at_home = Q(reason=UNREACHABLE), Q(home=Coalesce(F("worker__host"), Value("")))
    waits = failed & Q(updated_at__gt=Now() - _PAUSE)
    elsewhere = ~Q(home__in=all_hosts - hosts)
    there = Q(home__in=hosts) & ~(waits & at_home)
    fetched = ~waits & ~(failed & Q(home__in=all_hosts) & ~at_home)
    nobody_has_it = ~Q(home__in=all_hosts) & ~Q(shared__in=all_storages)
    an_older_one = (Q(older__in=storages) & ~waits) | ~Q(older__in=all_storages)
    return ~HAS_ORIGIN | (elsewhere & (there | (nobody_has_it & an_older_one))) | (Q(shared__in=storages) & fetched)


_PAUSE = ExpressionWrapper(Value(timedelta(seconds=FETCH_AGAIN_S)) * Power(2.0, F("attempts_not_taken") - 1), output_field=DurationField())


def bringers(run: Run, workers: Sequence[Worker]) -> list[Worker]:
    """Those of `workers`, who are all that are alive and may have the run, that can bring the checkpoint of a run with its source, those at its
    home first.
    """
    home, shared, older = run.home, run.shared, run.older  # type: ignore[attr-defined]
    at_home = [worker for worker in workers if worker.host == home]
    spared = run.reason == UNREACHABLE and bool(at_home) and (run.worker is None or run.worker.host != home)
    newest = at_home + [worker for worker in workers if shared and worker.storage == shared and worker.host != home and not spared]
    return newest or [worker for worker in workers if older and worker.storage == older]
