"""The list of runs, and the ways to make one."""

from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema
from pydantic import BaseModel
from rest_framework.request import Request
from rest_framework.response import Response

from experiments import access
from experiments.actions.cancel import cancel
from experiments.actions.describe import Refused, check
from experiments.actions.edit import edit
from experiments.actions.record import record
from experiments.actions.start import origin
from experiments.actions.submit import submit
from experiments.actions.transition import StateConflict
from experiments.api.endpoint import Endpoint, items, parameters
from experiments.api.idempotency import KEY, MakesRuns, given_key
from experiments.api.resources import RunResource, hosts, run_json
from experiments.api.runs_query import RunsQuery
from experiments.api.shapes import BulkBody, CheckpointReference, Described, RecordBody, SubmitBody
from experiments.models import Checkpoint, Role, Run
from experiments.telemetry.sparkline import sparklines
from spec.problems import Problem as FieldProblem

_WITH = ("project", "owner", "worker")


class RunList(BaseModel):
    """A page of runs."""

    items: list[RunResource]
    next_cursor: str | None


class Validated(BaseModel):
    """A spec with all its defaults, and what it costs."""

    spec: dict[str, Any]
    price: dict[str, Any]


class BulkResult(BaseModel):
    """The ids that were changed, and why others were not."""

    done: list[int]
    refused: list[dict[str, Any]]


class Runs(MakesRuns):
    """Runs of the projects one belongs to."""

    @extend_schema(operation_id="list_runs", parameters=parameters(RunsQuery), responses=RunList)
    def get(self, request: Request) -> Response:
        """Runs, newest first, page by page."""
        query = self.query(RunsQuery)
        page = list(query.apply(access.visible_runs(self.principal).select_related(*_WITH).prefetch_related(hosts()))[: query.limit + 1])
        more, page = len(page) > query.limit, page[: query.limit]
        lines = sparklines([run.pk for run in page])
        shown = [run_json(run, sparkline=lines.get(run.pk, [])) for run in page]
        return items(shown, query.cursor_after(page[-1]) if more else None, request)

    @extend_schema(
        operation_id="submit_run",
        request=SubmitBody,
        parameters=[KEY],
        responses={201: RunResource, 200: RunResource},
    )
    def post(self, request: Request) -> Response:
        """Queues a run. Sent again with the same Idempotency-Key and body it answers 200 with the same run."""
        given_key(request)
        body = self.body(SubmitBody)
        if body.validate_only:
            return _validated(body, self.principal)
        run, new = self.once(lambda: self._submit(body))
        return _created(run, 201 if new else 200)

    def _submit(self, body: SubmitBody) -> Run:
        project = self.project(body.project)
        start, parent = self._checkpoint(body.resume_from) if body.resume_from else (None, None)
        return submit(
            user=self.principal.user,
            project=project,
            spec=body.experiment(),
            runs=access.visible_runs(self.principal),
            name=body.name,
            tags=body.tags,
            notes=body.notes,
            priority=body.priority,
            parent=parent,
            resume_from=start,
        )

    def _checkpoint(self, wanted: CheckpointReference) -> tuple[dict[str, Any], Run]:
        """Where the run shall start from, and whose checkpoint that is. Raises Refused."""
        found = Checkpoint.objects.filter(run__in=access.visible_runs(self.principal), run=wanted.run, deleted=False)
        if wanted.step is not None:
            found = found.filter(step=wanted.step)
        newest = found.select_related("run__worker").order_by("-step", "-attempt").first()
        if newest is None:
            raise Refused([FieldProblem("/resume_from", f"resume_from: run {wanted.run} has no such checkpoint")])
        place = {"run": newest.run_id, "step": newest.step, "path": newest.path, "host": newest.run.worker.host if newest.run.worker else ""}
        return place, newest.run


class Validate(Endpoint):
    """Checks a description without running it."""

    @extend_schema(operation_id="validate_run", request=Described, responses=Validated)
    def post(self, request: Request) -> Response:
        """The whole spec and its price, or every problem at its field."""
        return _validated(self.body(Described), self.principal)


class Record(Endpoint):
    """Runs that outside trainers make."""

    @extend_schema(operation_id="record_run", request=RecordBody, responses={201: RunResource})
    def post(self, request: Request) -> Response:
        """Begins a run that sends its own telemetry (attempt 0) with a token of scope `ingest`."""
        body = self.body(RecordBody)
        run = record(user=self.principal.user, project=self.project(body.project), name=body.name, tags=body.tags, notes=body.notes)
        return _created(run, 201)


class Bulk(Endpoint):
    """One verb for many runs."""

    @extend_schema(operation_id="bulk", request=BulkBody, responses=BulkResult)
    def post(self, request: Request) -> Response:
        """Cancels or archives each run that one may edit; the others are listed with the reason."""
        body = self.body(BulkBody)
        wanted = list(dict.fromkeys(body.ids))
        editable = set(access.visible_runs(self.principal, Role.EDITOR).filter(pk__in=wanted).values_list("pk", flat=True))
        result = BulkResult(done=[], refused=[])
        for run_id in wanted:
            if run_id not in editable:
                result.refused.append({"id": run_id, "detail": f"there is no run {run_id} that you may edit"})
                continue
            try:
                cancel(run_id, by=self.by) if body.action == "cancel" else edit(run_id, archived=True)
                result.done.append(run_id)
            except (StateConflict, Run.DoesNotExist) as error:
                result.refused.append({"id": run_id, "detail": str(error)})
        return Response(result.model_dump())


def _validated(body: Described, principal: access.Principal) -> Response:
    spec = body.experiment()
    cost = check(spec)
    origin(spec, access.visible_runs(principal))
    return Response({"spec": spec.model_dump(mode="json"), "price": cost.model_dump()})


def _created(run: Run, status: int) -> Response:
    return Response(run_json(run, spec=True), status=status, headers={"Location": f"/api/v1/runs/{run.pk}"})
