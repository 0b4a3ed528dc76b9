"""How a worker takes a generation, keeps it, and answers it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self

from django.db.models import QuerySet
from drf_spectacular.utils import extend_schema
from pydantic import BaseModel, Field, StringConstraints, model_validator
from rest_framework.request import Request
from rest_framework.response import Response

from experiments import access
from experiments.actions.serve_generation import HEARTBEAT_S, LEASE_S, Fenced, claim_generation, fail, renew, send_back, succeed
from experiments.actions.stored import place_for
from experiments.api.endpoint import Body, Endpoint
from experiments.api.problems import Problem
from experiments.api.shapes import EmptyBody, RunId, Small
from experiments.api.workers import speaking
from experiments.models import Generation, Role, Run
from spec.text import Storable

MAX_POSITIONS = 8192


class TakeBody(Body):
    """A worker's wish for a generation."""

    worker: RunId


class AttemptBody(Body):
    """Whose word it is."""

    attempt: Annotated[int, Field(ge=1, le=2**31 - 1)]


class Written(Body):
    """What was written, the prompt first: T tokens, L MoE layers, E experts.

    `experts` and `gates` are [T][L][chosen]: where an expert had no room for a token, or none was chosen, it is not named.
    """

    step: Small
    prompt_tokens: Small
    stopped: Literal["length", "end_of_document"]
    ids: list[Small] = Field(min_length=1, max_length=MAX_POSITIONS)
    texts: list[Annotated[Storable, StringConstraints(max_length=200)]] = Field(max_length=MAX_POSITIONS)
    log_probs: list[float | None] = Field(max_length=MAX_POSITIONS)
    moe_layers: list[Small] = Field(max_length=1000)
    n_experts: Small
    experts: list[list[list[Small]]] = Field(max_length=MAX_POSITIONS)
    gates: list[list[list[float]]] = Field(max_length=MAX_POSITIONS)
    usage: list[list[Small]] = Field(max_length=1000)
    batch_dependent: bool
    notes: list[Annotated[Storable, StringConstraints(max_length=500)]] = Field(max_length=10)
    seconds: float = Field(ge=0)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        lengths = {len(column) for column in (self.ids, self.texts, self.log_probs, self.experts, self.gates)}
        if len(lengths) != 1 or self.prompt_tokens > len(self.ids):
            raise ValueError("ids, texts, log_probs, experts and gates have one entry for each token")
        layers = len(self.moe_layers)
        if len(self.usage) != layers or any(len(row) != self.n_experts for row in self.usage):
            raise ValueError("usage is [layer][expert]")
        for experts, gates in zip(self.experts, self.gates, strict=True):
            if len(experts) != layers or [len(row) for row in experts] != [len(row) for row in gates]:
                raise ValueError("experts and gates are [token][layer][chosen]")
            if any(expert >= self.n_experts for row in experts for expert in row):
                raise ValueError(f"experts are numbered from 0 to {self.n_experts - 1}")
        return self


class AnswerBody(AttemptBody):
    """How it went: `not_here` where the worker does not have the checkpoint."""

    outcome: Literal["succeeded", "failed", "not_here"]
    reason: Annotated[Storable, StringConstraints(max_length=64)] = ""
    detail: Annotated[Storable, StringConstraints(max_length=4000)] = ""
    result: Written | None = None

    @model_validator(mode="after")
    def _result_of_success(self) -> Self:
        if (self.outcome == "succeeded") != (self.result is not None):
            raise ValueError("a result goes with outcome succeeded, and with no other")
        return self


class OfferedGeneration(BaseModel):
    """Everything that a worker needs. `sha256` is of the checkpoint's manifest, `place` where it can fetch it from its storage."""

    generation: int
    attempt: int
    run: int
    step: int
    sha256: str
    prompt: str
    parameters: dict[str, Any]
    place: str | None
    spec: dict[str, Any] | None
    lease_s: int
    heartbeat_s: int


@contextmanager
def _told() -> Iterator[None]:
    """What the actions raise, as the API says it."""
    try:
        yield
    except Fenced as fenced:
        raise Problem("conflict", str(fenced)) from fenced
    except Generation.DoesNotExist:
        raise Problem("not-found", "there is no such generation that was given to this token's worker") from None


class _OfWorker(Endpoint):
    @property
    def runs(self) -> QuerySet[Run]:
        """The runs whose generations this worker may answer: those that its owner may edit."""
        return access.visible_runs(self.principal, Role.EDITOR)


class ClaimGeneration(_OfWorker):
    """A worker's wish for a generation."""

    @extend_schema(operation_id="worker_claim_generation", request=TakeBody, responses={200: OfferedGeneration, 204: None})
    def post(self, request: Request) -> Response:
        """The oldest that waits and that this worker has not sent back; 204 if there is none."""
        body = self.body(TakeBody)
        worker = speaking(self.principal, body.worker)
        offer = claim_generation(self.runs, worker=worker)
        if offer is None:
            return Response(status=204)
        generation, checkpoint = offer.generation, offer.checkpoint
        told = {"prompt": generation.prompt, "parameters": generation.parameters, "step": checkpoint.step, "sha256": checkpoint.sha256}
        place = place_for(checkpoint, worker)
        told |= {"place": place, "spec": checkpoint.run.spec if place else None}
        ids = {"generation": generation.pk, "attempt": generation.attempt, "run": generation.run_id}
        return Response(OfferedGeneration(**ids, **told, lease_s=LEASE_S, heartbeat_s=HEARTBEAT_S).model_dump(mode="json"))


class Heartbeat(_OfWorker):
    """A worker's sign that it is at it."""

    @extend_schema(operation_id="worker_keep_generation", request=AttemptBody, responses={200: EmptyBody})
    def post(self, request: Request, generation_id: int) -> Response:
        """Extends the lease; 409 if the generation is no longer this attempt's: stop."""
        body = self.body(AttemptBody)
        with _told():
            renew(self.runs, _bigint(generation_id), body.attempt)
        return Response({})


class Answer(_OfWorker):
    """A worker's answer."""

    @extend_schema(operation_id="worker_answer_generation", request=AnswerBody, responses={200: EmptyBody})
    def post(self, request: Request, generation_id: int) -> Response:
        """Ends the generation, or sends it on to another worker; 409 if it is no longer this attempt's."""
        body, number = self.body(AnswerBody), _bigint(generation_id)
        with _told():
            if body.result is not None:
                succeed(self.runs, number, body.attempt, body.result.model_dump(mode="json"))
            elif body.outcome == "not_here":
                send_back(self.runs, number, body.attempt)
            else:
                fail(self.runs, number, body.attempt, reason=body.reason or "error", detail=body.detail)
        return Response({})


def _bigint(number: int) -> int:
    """The id, or one that no row has where PostgreSQL could not hold it."""
    return number if number < 2**63 else -1
