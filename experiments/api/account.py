"""Who one is, and how the house is."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.db.models import Count
from drf_spectacular.utils import extend_schema
from pydantic import BaseModel
from rest_framework.request import Request
from rest_framework.response import Response

from experiments import access
from experiments.actions.books import WORKER_SILENT_S
from experiments.actions.now import after_now
from experiments.api.endpoint import Endpoint, Query
from experiments.api.projects import ProjectResource, projects_of
from experiments.health import database_answers, valkey_answers
from experiments.models import Worker


class Account(BaseModel):
    """The user, what this way of asking may do, and the projects."""

    id: int
    user: str
    is_superuser: bool
    scopes: list[str]
    projects: list[ProjectResource]


class System(BaseModel):
    """Which servers answer (`ok` or `down`), what the workers have, and how many of one's runs are in each state."""

    status: str
    database: str
    valkey: str
    workers_alive: int
    slots: int
    runs: dict[str, int]
    max_params: int


class Me(Endpoint):
    """Oneself."""

    @extend_schema(operation_id="me", responses=Account)
    def get(self, request: Request) -> Response:
        """Name, scopes, projects and roles."""
        self.query(Query)
        who = self.principal
        shown: dict[str, Any] = {"id": who.user.pk, "user": who.user.get_username(), "is_superuser": access.is_administrator(who)}
        return Response({**shown, "scopes": sorted(who.scopes), "projects": projects_of(who)})


class SystemState(Endpoint):
    """The house."""

    @extend_schema(operation_id="system", responses=System)
    def get(self, request: Request) -> Response:
        """Servers, workers, and the number of runs in each state."""
        self.query(Query)
        counts = access.visible_runs(self.principal).order_by().values_list("state").annotate(n=Count("pk"))
        slots = Worker.objects.filter(last_seen__gt=after_now(-WORKER_SILENT_S)).values_list("slots", flat=True)
        database, valkey = database_answers(), valkey_answers()
        return Response(
            System(
                status="ok" if database and valkey else "degraded",
                database="ok" if database else "down",
                valkey="ok" if valkey else "down",
                workers_alive=len(slots),
                slots=sum(slots),
                runs=dict(counts),
                max_params=settings.MOELAB_MAX_PARAMS,
            ).model_dump()
        )
