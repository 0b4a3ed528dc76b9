"""What one can ask of a run."""

from __future__ import annotations

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from experiments import access
from experiments.actions.cancel import cancel
from experiments.actions.checkpoint_now import checkpoint_now
from experiments.actions.clone import clone
from experiments.actions.pause import pause
from experiments.actions.restart import restart
from experiments.actions.resume import resume
from experiments.api.idempotency import KEY, MakesRuns
from experiments.api.resources import RunResource, run_json
from experiments.api.shapes import CloneBody, EmptyBody
from experiments.models import Run

_ACCEPTED = {202: RunResource}


class _Verb(MakesRuns):
    def answer(self, run: Run, status: int = 202) -> Response:
        """The run as it is now. A new run is also named in Location."""
        headers = {} if run.pk == self.kwargs["run_id"] else {"Location": f"/api/v1/runs/{run.pk}"}
        return Response(run_json(self.run(run.pk), spec=True), status=status, headers=headers)


class Cancel(_Verb):
    """Stops a run for good."""

    @extend_schema(operation_id="cancel_run", request=EmptyBody, responses=_ACCEPTED)
    def post(self, request: Request, run_id: int) -> Response:
        """At once if it is queued or paused; else its supervisor saves a checkpoint and stops. Again is harmless."""
        self.body(EmptyBody)
        return self.answer(cancel(run_id, by=self.by))


class Pause(_Verb):
    """Stops a run for a while."""

    @extend_schema(operation_id="pause_run", request=EmptyBody, responses=_ACCEPTED)
    def post(self, request: Request, run_id: int) -> Response:
        """The run saves a checkpoint and gives its devices back."""
        self.body(EmptyBody)
        return self.answer(pause(run_id, by=self.by))


class Resume(_Verb):
    """Lets a paused run go on."""

    @extend_schema(operation_id="resume_run", request=EmptyBody, responses=_ACCEPTED)
    def post(self, request: Request, run_id: int) -> Response:
        """The run is queued and goes on from its newest checkpoint."""
        self.body(EmptyBody)
        return self.answer(resume(run_id, by=self.by))


class Checkpoint(_Verb):
    """Saves a run."""

    @extend_schema(operation_id="checkpoint_run", request=EmptyBody, responses=_ACCEPTED)
    def post(self, request: Request, run_id: int) -> Response:
        """The run saves a checkpoint after its present step and goes on."""
        self.body(EmptyBody)
        return self.answer(checkpoint_now(run_id))


class Restart(_Verb):
    """Runs the same again."""

    @extend_schema(operation_id="restart_run", request=EmptyBody, parameters=[KEY], responses=_ACCEPTED)
    def post(self, request: Request, run_id: int) -> Response:
        """A new run of the same spec, from step 1; its parent is this one, which must have ended."""
        self.body(EmptyBody)
        runs = access.visible_runs(self.principal)
        made, _ = self.once(lambda: restart(self.run(run_id), user=self.principal.user, runs=runs), "restart", run_id)
        return self.answer(made)


class Clone(_Verb):
    """Runs a variant."""

    @extend_schema(operation_id="clone_run", request=CloneBody, parameters=[KEY], responses={201: RunResource, 200: RunResource})
    def post(self, request: Request, run_id: int) -> Response:
        """A new run with single fields of the spec changed by dotted path; its parent is this one.

        Sent again with the same Idempotency-Key and body it answers 200 with the same run.
        """
        body = self.body(CloneBody)
        user, runs = self.principal.user, access.visible_runs(self.principal)
        made, new = self.once(lambda: clone(self.run(run_id), user=user, runs=runs, changes=body.set, name=body.name), "clone", run_id)
        return self.answer(made, 201 if new else 200)
