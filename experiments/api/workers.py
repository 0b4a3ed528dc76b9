"""Workers: who they are, and how they take work."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any

from django.db.models import Count, F, Q
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from pydantic import BaseModel, Field
from rest_framework.request import Request
from rest_framework.response import Response

from experiments import access
from experiments.actions.books import WORKER_SILENT_S
from experiments.actions.claim import Claim, claim
from experiments.actions.lease import HEARTBEAT_S, LEASE_S
from experiments.actions.stored import handed_out
from experiments.actions.worker import HeldByAnother, greet, hear, release
from experiments.api.endpoint import Endpoint, Query, items
from experiments.api.problems import FieldError, Problem
from experiments.api.shapes import ClaimBody, EmptyBody, HelloBody
from experiments.models import LIVE, Node, Role, Worker


class WorkerResource(BaseModel):
    """A host that takes runs; `alive` if it was heard from within a minute."""

    id: int
    name: str
    host: str
    pid: int
    version: str
    devices: list[dict[str, Any]]
    slots: int
    storage: str = Field(description="The storage that it shares checkpoints in; empty for none.")
    busy: int
    runs: list[int]
    alive: bool
    held_by: str | None = Field(description="Whose tokens may speak under this name; null where whoever says it next may.")
    last_seen: datetime
    created_at: datetime


class WorkerList(BaseModel):
    """All workers, those heard from last first."""

    items: list[WorkerResource]
    next_cursor: None


class Welcome(BaseModel):
    """The worker's id."""

    worker: int


class ClaimedRun(BaseModel):
    """Everything that a supervisor needs."""

    run: int
    attempt: int
    token: str
    spec: dict[str, Any]
    devices: list[str]
    node: int = Field(description="Which of the run's hosts this is: node 0 writes, and speaks for the attempt.")
    nodes: int
    resume_from: dict[str, Any] | None
    start: dict[str, Any] | None
    checkpoints: list[dict[str, Any]]
    trained: int = Field(description="The last attempt that trained.")
    stored_as: str = Field(description="The run's folder in the worker's storage.")
    ingest_url: str
    lease_s: int
    heartbeat_s: int


class Workers(Endpoint):
    """The hosts that take runs."""

    @extend_schema(operation_id="list_workers", responses=WorkerList)
    def get(self, request: Request) -> Response:
        """Each with the runs on it that one may see."""
        self.query(Query)
        visible = access.visible_runs(self.principal).filter(state__in=LIVE)
        parts = Node.objects.filter(run__state__in=LIVE, attempt=F("run__attempt"), rank__gt=0)
        on_worker: dict[int | None, list[int]] = {}
        places = [*visible.values_list("pk", "worker_id"), *parts.filter(run__in=visible).values_list("run_id", "worker_id")]
        for run_id, worker_id in sorted(places, key=lambda place: place[0]):
            on_worker.setdefault(worker_id, []).append(run_id)
        others = Counter(parts.values_list("worker_id", flat=True))
        rows = (
            Worker.objects.select_related("token__user")
            .annotate(busy=Count("runs", filter=Q(runs__state__in=LIVE)))
            .order_by("-last_seen", "id")[:1000]
        )
        return items([self._shown(row, row.busy + others[row.pk], on_worker.get(row.pk, [])) for row in rows])

    @staticmethod
    def _shown(row: Worker, busy: int, runs: list[int]) -> dict[str, Any]:
        same = {
            name: getattr(row, name) for name in ("id", "name", "host", "pid", "version", "devices", "slots", "storage", "last_seen", "created_at")
        }
        alive = (timezone.now() - row.last_seen).total_seconds() < WORKER_SILENT_S
        holder = row.token.user.get_username() if row.token else None
        return WorkerResource(**same, busy=busy, runs=runs, alive=alive, held_by=holder).model_dump(mode="json")


class Release(Endpoint):
    """The name of a worker."""

    @extend_schema(operation_id="release_worker", request=None, responses={204: None})
    def post(self, request: Request, worker_id: int) -> Response:
        """Lets go of it: whoever says it next holds it. Stop the worker that says it now first, or revoke its token. Again is harmless."""
        self.body(EmptyBody)
        if worker_id >= 2**63 or not release(worker_id):
            raise Problem("not-found", f"there is no worker {worker_id}")
        return Response(status=204)


def speaking(principal: access.Principal, worker_id: int) -> Worker:
    """The worker that the principal says to be, which was heard from. Raises Problem (409, 422)."""
    try:
        return hear(principal, worker_id)
    except Worker.DoesNotExist:
        raise Problem("invalid", errors=[FieldError(pointer="/worker", detail=f"worker: there is no worker {worker_id}; say hello first")]) from None
    except HeldByAnother as held:
        raise Problem("conflict", errors=[FieldError(pointer="/worker", detail=f"worker: {held}")]) from held


class Hello(Endpoint):
    """A worker's sign of life."""

    @extend_schema(operation_id="worker_hello", request=HelloBody, responses=Welcome)
    def post(self, request: Request) -> Response:
        """Registers the worker, or says again that it is there and what it has; 409 if the name is another's."""
        told = self.body(HelloBody).model_dump()
        try:
            worker = greet(self.principal, **told)
        except HeldByAnother as held:
            raise Problem("conflict", errors=[FieldError(pointer="/name", detail=f"name: {held}")]) from held
        return Response({"worker": worker.pk})


class ClaimWork(Endpoint):
    """A worker's wish for work."""

    @extend_schema(operation_id="worker_claim", request=ClaimBody, responses={200: ClaimedRun, 204: None})
    def post(self, request: Request) -> Response:
        """A run for the worker to start, with the attempt's token; 204 if there is none that fits."""
        body = self.body(ClaimBody)
        worker = speaking(self.principal, body.worker)
        runs = access.visible_runs(self.principal, Role.EDITOR)
        found = claim(runs, worker=worker, free_slots=body.free_slots, free_devices=body.free_devices)
        return Response(status=204) if found is None else Response(self._handed_out(found, worker))

    def _handed_out(self, found: Claim, worker: Worker) -> dict[str, Any]:
        run, scheme = found.run, "wss" if self.request.is_secure() else "ws"
        return ClaimedRun(
            run=run.pk,
            attempt=run.attempt,
            token=found.token,
            spec=run.spec,
            devices=found.devices,
            node=found.node,
            nodes=run.node_count,
            **handed_out(run, worker),
            ingest_url=f"{scheme}://{self.request.get_host()}/ws/ingest/{run.pk}/?attempt={run.attempt}&node={found.node}",
            lease_s=LEASE_S,
            heartbeat_s=HEARTBEAT_S,
        ).model_dump(mode="json")
