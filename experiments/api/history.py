"""What has happened to a run, what it saved, and how it differs from another."""

from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema
from pydantic import BaseModel, Field
from rest_framework.request import Request
from rest_framework.response import Response

from experiments import access
from experiments.api.endpoint import Endpoint, Query, items, parameters
from experiments.api.problems import wrong_parameter
from experiments.api.resources import (
    CheckpointResource,
    NodeEnd,
    TransitionResource,
    checkpoint_json,
    node_json,
    nodes_of,
    transition_json,
)
from spec.diff import diff


class TransitionList(BaseModel):
    """A run's whole history."""

    items: list[TransitionResource]
    next_cursor: None


class NodeList(BaseModel):
    """The hosts of a run's attempts; empty for a run on one host."""

    items: list[NodeEnd]
    next_cursor: None


class CheckpointList(BaseModel):
    """A run's checkpoints, newest first."""

    items: list[CheckpointResource]
    next_cursor: None


class Difference(BaseModel):
    """A field in which two specs differ; null stands for absent."""

    path: str
    before: Any
    after: Any


class DiffResult(BaseModel):
    """From the spec of run `against` to that of `run`."""

    run: int
    against: int | None
    changes: list[Difference]


class DiffQuery(Query):
    """What to compare with."""

    against: int | None = Field(None, ge=1, lt=2**63, description="A run's id; its parent if left out.")


class Transitions(Endpoint):
    """The changes of a run's state."""

    @extend_schema(operation_id="list_transitions", responses=TransitionList)
    def get(self, request: Request, run_id: int) -> Response:
        """Who moved the run where, when and why, in order."""
        self.query(Query)
        return items([transition_json(row) for row in self.run(run_id).transitions.order_by("id")])


class Nodes(Endpoint):
    """The hosts of a run that is on several."""

    @extend_schema(operation_id="list_nodes", responses=NodeList)
    def get(self, request: Request, run_id: int) -> Response:
        """Those of each attempt, the newest attempt first: which ranks were where, how they ended, and the end of each host's log."""
        self.query(Query)
        return items([node_json(row) for row in nodes_of(self.run(run_id))])


class Checkpoints(Endpoint):
    """The checkpoints of a run."""

    @extend_schema(operation_id="list_checkpoints", responses=CheckpointList)
    def get(self, request: Request, run_id: int) -> Response:
        """Newest first, those that newer ones have replaced on disk included."""
        self.query(Query)
        return items([checkpoint_json(row) for row in self.run(run_id).checkpoints.select_related("run").order_by("-step", "-attempt")])


class Diff(Endpoint):
    """What a run changed."""

    @extend_schema(operation_id="diff_run", parameters=parameters(DiffQuery), responses=DiffResult)
    def get(self, request: Request, run_id: int) -> Response:
        """The fields of the spec that differ from another run's, or from the parent's; none if there is no parent."""
        run, wanted = self.run(run_id), self.query(DiffQuery).against
        other = access.visible_runs(self.principal).filter(pk=wanted or run.parent_id or 0).first()
        if wanted and other is None:
            raise wrong_parameter("against", f"against: there is no run {wanted}")
        changes = [Difference(path=path, before=before, after=after) for path, before, after in diff(other.spec, run.spec)] if other else []
        return Response(DiffResult(run=run.pk, against=other.pk if other else None, changes=changes).model_dump())
