"""What the API answers with: each resource's shape, and how a row becomes one. The live sockets and the pages use the same."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.conf import settings
from django.db.models import Prefetch, QuerySet, prefetch_related_objects
from pydantic import BaseModel, ConfigDict, Field

from experiments.actions.stored import stored_at
from experiments.models import Checkpoint, Node, Run, State, Token, Transition


class Out(BaseModel):
    """A resource; times are RFC 3339 in UTC."""

    model_config = ConfigDict(extra="forbid")


class NodeResource(Out):
    """A host of an attempt that is on several: node `rank`, with the run's `ranks`; `outcome` is "" while they train.

    `exit_code` or `signal` is that of the first of its ranks that failed.
    """

    attempt: int
    rank: int
    worker: str
    host: str
    devices: list[str]
    ranks: list[int]
    outcome: str
    reason: str
    detail: str
    left_at: datetime | None
    exit_code: int | None
    signal: int | None


class NodeEnd(NodeResource):
    """With the end of its log."""

    log_tail: str = Field(description="How the host's log ends; after a hang with the stacks of its ranks.")


class RunResource(Out):
    """A run. `spec` only in a run's own answer, `sparkline` (at most 40 losses) only in lists."""

    id: int
    project: str
    owner: str
    name: str
    recorded: bool = Field(description="Made by an outside trainer and reported by moelab.Recorder.")
    state: str
    reason: str
    detail: str
    exit_code: int | None
    signal: int | None
    attempt: int
    desired: str
    parent: int | None
    tags: list[str]
    notes: str
    starred: bool
    archived: bool
    priority: int
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    updated_at: datetime
    worker: str | None
    devices: list[str]
    node_count: int
    nodes: list[NodeResource] = Field(description="The hosts of the newest attempt, where the run is on several; `worker` is the first one's.")
    device_names: list[str]
    steps: int
    last_step: int
    progress: float
    tokens_per_s: float | None
    seconds_left: float | None
    summary: dict[str, float | None]
    best_val_loss: float | None
    total_params: int
    active_params: int
    tokens_per_step: int
    spikes: int
    layers: int
    moe_layers: list[int]
    experts: int
    top_k: int
    metric_names: list[str]
    phases: list[str]
    balance_terms: list[str]
    ops: dict[str, str]
    versions: dict[str, str]
    resumed_from_step: int | None
    resume_from: dict[str, Any] | None
    checkpoint_requests: int
    log_size: int
    url: str
    spec: dict[str, Any] | None = None
    sparkline: list[float] | None = None


_SAME = frozenset(RunResource.model_fields) & {field.attname for field in Run._meta.concrete_fields} - {"spec"}


def run_json(run: Run, *, spec: bool = False, sparkline: list[float] | None = None) -> dict[str, Any]:
    """The run as JSON-able data. `run.project`, `run.owner` and `run.worker` should have been selected with it."""
    resource = RunResource(
        **{name: getattr(run, name) for name in _SAME},
        project=run.project.name,
        owner=run.owner.get_username(),
        worker=run.worker.name if run.worker else None,
        parent=run.parent_id,
        nodes=_nodes(run) if run.node_count > 1 and run.attempt else [],
        progress=_progress(run),
        seconds_left=_seconds_left(run),
        layers=int(run.spec.get("model", {}).get("n_layers", 0)) or max(run.moe_layers, default=-1) + 1,
        experts=run.n_experts,
        url=f"{settings.MOELAB_PUBLIC_URL}/runs/{run.pk}",
        spec=run.spec if spec and not run.recorded else None,
        sparkline=sparkline,
    )
    absent = ({"spec"} if not spec else set()) | ({"sparkline"} if sparkline is None else set())
    return resource.model_dump(mode="json", exclude=absent)


def hosts() -> Prefetch[Any, Any, Any]:
    """What a list of runs is to prefetch for `run_json`."""
    return Prefetch("nodes", Node.objects.defer("log_tail").select_related("worker"))


def _nodes(run: Run) -> list[NodeResource]:
    prefetch_related_objects([run], hosts())  # unless that was done for a whole list
    return [_node(row) for row in sorted(run.nodes.all(), key=lambda node: node.rank) if row.attempt == run.attempt]


def _node(row: Node) -> NodeResource:
    same = set(NodeResource.model_fields) - {"worker", "host"}
    return NodeResource(worker=row.worker.name, host=row.worker.host, **{name: getattr(row, name) for name in same})


def nodes_of(run: Run) -> QuerySet[Node]:
    """The hosts of all attempts, the newest attempt's first, with their workers."""
    return run.nodes.filter(attempt__gt=0).select_related("worker").order_by("-attempt", "rank")


def node_json(row: Node) -> dict[str, Any]:
    """`row.worker` should have been selected with it."""
    return NodeEnd(**_node(row).model_dump(), log_tail=row.log_tail).model_dump(mode="json")


def _progress(run: Run) -> float:
    """Share of the steps that are done, 0 to 1; 0 where nobody knows how many there will be."""
    if run.state == State.SUCCEEDED:
        return 1.0
    return min(1.0, run.last_step / run.steps) if run.steps else 0.0


def _seconds_left(run: Run) -> float | None:
    if run.state != State.RUNNING or not run.tokens_per_s or not run.steps or not run.tokens_per_step:
        return None
    return max(0, run.steps - run.last_step) * run.tokens_per_step / run.tokens_per_s


class TransitionResource(Out):
    """One change of a run's state."""

    id: int
    at: datetime
    from_state: str
    to_state: str
    by: str
    reason: str
    detail: str
    attempt: int


def transition_json(row: Transition) -> dict[str, Any]:
    return _same(TransitionResource, row)


class CheckpointResource(Out):
    """A checkpoint; `path` is on the disk of `host`. `stored_at` is the URL of its copy in a storage, empty where `storage_problem` may say why."""

    id: int
    attempt: int
    step: int
    path: str
    size_bytes: int
    sha256: str
    seconds: float
    at: datetime
    deleted: bool
    host: str
    stored_at: str
    storage_problem: str


def checkpoint_json(row: Checkpoint) -> dict[str, Any]:
    """`row.run` should have been selected with it."""
    return {**_same(CheckpointResource, row, without={"stored_at"}), "stored_at": stored_at(row)}


class TokenResource(Out):
    """A token without its secret."""

    id: int
    name: str
    prefix: str
    scopes: list[str]
    project: str | None
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


class NewTokenResource(TokenResource):
    """A token at the one moment when its secret is known."""

    secret: str


def token_json(row: Token, secret: str | None = None) -> dict[str, Any]:
    shown = {**_same(TokenResource, row, without={"project"}), "project": row.project.name if row.project else None}
    return shown if secret is None else {**shown, "secret": secret}


def _same(shape: type[Out], row: Any, without: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    values = {name: getattr(row, name) for name in shape.model_fields if name not in without}
    return shape.model_construct(**values).model_dump(mode="json", exclude=without)
