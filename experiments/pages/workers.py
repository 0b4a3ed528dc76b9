"""The hosts that take runs: their devices, when they were last heard of, what they are busy with."""

from __future__ import annotations

from datetime import timedelta

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils import timezone

from experiments.access import Principal, visible_runs
from experiments.models import Worker
from experiments.models.run import LIVE
from experiments.pages.gate import page

SILENT_AFTER_S = 60


@page
def listing(request: HttpRequest, principal: Principal) -> HttpResponse:
    """The table; the names of runs that the reader may not see are left out."""
    workers = list(Worker.objects.order_by("name"))
    busy = visible_runs(principal).filter(state__in=LIVE, worker__isnull=False).order_by("id")
    since = timezone.now() - timedelta(seconds=SILENT_AFTER_S)
    for worker in workers:
        worker.busy = [run for run in busy if run.worker_id == worker.pk]  # type: ignore[attr-defined]
        worker.alive = worker.last_seen > since or bool(worker.busy)  # type: ignore[attr-defined]
    return render(request, "pages/workers.html", {"workers": workers, "origin": request.build_absolute_uri("/")[:-1]})
