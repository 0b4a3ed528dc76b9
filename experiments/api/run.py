"""One run: read it, wait for it, edit it, delete it."""

from __future__ import annotations

import hashlib
import threading
import time
from typing import Any, Literal

from django.db import connection, transaction
from django.http import Http404
from drf_spectacular.utils import OpenApiParameter, extend_schema
from pydantic import Field
from rest_framework.request import Request
from rest_framework.response import Response

from experiments.actions.delete import delete
from experiments.actions.edit import edit
from experiments.actions.transition import locked
from experiments.api.endpoint import Endpoint, JSONOut, Query, parameters
from experiments.api.problems import FieldError, Problem
from experiments.api.resources import RunResource, run_json
from experiments.api.shapes import PatchBody
from experiments.models import TERMINAL, Run

MAX_WAIT_S = 60
POLL_S = 0.25
_places = threading.BoundedSemaphore(200)
"""Requests that wait at once in this process; further ones are answered as if their time were over."""


class RunQuery(Query):
    """How long to wait for the answer."""

    wait: Literal["terminal", "change"] | None = Field(None, description="Answer when the run has ended, or has changed, or `timeout` is over.")
    timeout: float = Field(30, ge=0, le=MAX_WAIT_S, description="Seconds to wait.")


class OneRun(Endpoint):
    """A run with its spec."""

    @extend_schema(
        operation_id="get_run",
        parameters=[*parameters(RunQuery), OpenApiParameter("If-None-Match", str, "header")],
        responses={200: RunResource, 304: None},
    )
    def get(self, request: Request, run_id: int) -> Response:
        """The run, with an ETag. With `wait`, as soon as it has changed (from If-None-Match, if sent) or ended."""
        query = self.query(RunQuery)
        run, known = self.run(run_id), request.headers.get("If-None-Match", "")
        if query.wait and (query.wait == "terminal" or not known or _etag(run_json(run, spec=True)) in known):
            run = self._wait(run, query)
        shown = run_json(run, spec=True)
        headers = {"ETag": _etag(shown), "Cache-Control": "no-cache"}
        return Response(status=304, headers=headers) if _etag(shown) in known else Response(shown, headers=headers)

    def _wait(self, run: Run, query: RunQuery) -> Run:
        """The run as it is when the wait is over. Raises Http404 if it was deleted meanwhile."""
        if not _places.acquire(blocking=False):
            return run
        try:
            deadline, before = time.monotonic() + query.timeout, _mark(run.pk)
            while run.state not in TERMINAL and time.monotonic() < deadline:
                _let_go_of_the_connection()
                time.sleep(max(0.0, min(POLL_S, deadline - time.monotonic())))
                now = _mark(run.pk)
                if now is None or now[0] in TERMINAL or (query.wait == "change" and now != before):
                    break
            return self.run(run.pk)
        finally:
            _places.release()

    @extend_schema(operation_id="edit_run", request=PatchBody, parameters=[OpenApiParameter("If-Match", str, "header")], responses={200: RunResource})
    def patch(self, request: Request, run_id: int) -> Response:
        """Changes what people write about a run; with If-Match only if nobody has changed it since."""
        body, wanted = self.body(PatchBody), request.headers.get("If-Match", "*")
        changes = body.model_dump(exclude_none=True)
        if nothing := [name for name, value in body.model_dump(exclude_unset=True).items() if value is None]:
            said = "null is no value; leave out what shall stay"
            raise Problem("invalid", errors=[FieldError(pointer=f"/{name}", detail=f"{name}: {said}") for name in nothing])
        with transaction.atomic():
            locked(run_id)
            if wanted.strip() != "*" and _etag(run_json(self.run(run_id), spec=True)) not in wanted:
                detail = "If-Match: is not the run's ETag any more; read the run again"
                raise Problem("precondition-failed", detail, [FieldError(header="If-Match", detail=detail)])
            edit(run_id, **changes)
        shown = run_json(self.run(run_id), spec=True)
        return Response(shown, headers={"ETag": _etag(shown)})

    @extend_schema(operation_id="delete_run", responses={204: None})
    def delete(self, request: Request, run_id: int) -> Response:
        """Deletes a run that has ended, and all that it recorded."""
        try:
            delete(run_id)
        except Run.DoesNotExist:
            raise Http404 from None
        return Response(status=204)


def _etag(shown: dict[str, Any]) -> str:
    return f'"{hashlib.sha256(JSONOut().render(shown)).hexdigest()[:32]}"'


def _mark(run_id: int) -> tuple[Any, ...] | None:
    """What tells one moment of a run from the next, in one small row."""
    return Run.objects.filter(pk=run_id).values_list("state", "updated_at", "last_step", "attempt").first()


def _let_go_of_the_connection() -> None:
    """Gives the connection back to the pool: who waits must not keep others from the database."""
    if not connection.in_atomic_block:
        connection.close()
