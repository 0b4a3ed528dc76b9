"""The hosts that take runs: their devices, when they were last heard of, what they are busy with."""

from __future__ import annotations

from datetime import timedelta

from django.db.models import F
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils import timezone

from experiments.access import Principal, is_administrator, visible_runs
from experiments.models import Node, Worker
from experiments.models.run import LIVE
from experiments.pages.gate import page

SILENT_AFTER_S = 60


@page
def listing(request: HttpRequest, principal: Principal) -> HttpResponse:
    """The table; the names of runs that the reader may not see are left out."""
    workers = list(Worker.objects.select_related("token__user").order_by("name"))
    live = visible_runs(principal).filter(state__in=LIVE)
    alone = [(run.worker_id, run, run.devices) for run in live.filter(worker__isnull=False, node_count=1).order_by("id")]
    shared = Node.objects.filter(run__in=live, attempt=F("run__attempt"), attempt__gt=0).select_related("run").order_by("run", "rank")
    parts = [*alone, *((node.worker_id, node.run, node.devices) for node in shared)]
    since = timezone.now() - timedelta(seconds=SILENT_AFTER_S)
    for worker in workers:
        worker.busy = [{"run": run, "devices": devices} for on, run, devices in parts if on == worker.pk]  # type: ignore[attr-defined]
        worker.alive = worker.last_seen > since or bool(worker.busy)  # type: ignore[attr-defined]
    origin, may_release = request.build_absolute_uri("/")[:-1], is_administrator(principal)
    return render(request, "pages/workers.html", {"workers": workers, "origin": origin, "may_release": may_release})
