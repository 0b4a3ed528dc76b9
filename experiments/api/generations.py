"""Text from a run's checkpoint, with the experts that wrote it: ask for it, and read what came."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Annotated, Any

from django.db import IntegrityError, transaction
from drf_spectacular.utils import extend_schema
from pydantic import BaseModel, Field
from rest_framework.request import Request
from rest_framework.response import Response

from experiments.actions.generate import MAX_PROMPT, MAX_TOKENS, generate
from experiments.api.endpoint import Body, Endpoint, Query, items, parameters
from experiments.api.idempotency import KEY, given_key
from experiments.api.problems import FieldError, Problem
from experiments.api.shapes import Small
from experiments.api.worker_generations import Written
from experiments.models import Generation, Run
from spec.text import Text

COLUMNS = ("id", "prompt", "state", "reason", "detail", "wanted_step", "step", "attempt", "created_at", "started_at", "ended_at")


class GenerateBody(Body):
    """What to go on from, and how. Temperature 0 takes the most probable token each time."""

    prompt: Annotated[Text, Field(max_length=MAX_PROMPT)] = Field("", description="The text to go on from; empty begins a document.")
    tokens: int = Field(64, ge=1, le=MAX_TOKENS, description="Tokens to write, at most.")
    temperature: float = Field(0.8, ge=0, le=10, description="Divides the logits; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Only the most probable tokens that make up this share are drawn from.")
    top_k: int = Field(0, ge=0, le=1_000_000, description="Only so many of the most probable tokens are drawn from; 0 means all.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="The same seed draws the same text.")
    step: Small | None = Field(None, description="The checkpoint's step; the newest without it.")

    def sampling(self) -> dict[str, Any]:
        """How to go on, as the worker is told."""
        return self.model_dump(include={"tokens", "temperature", "top_p", "top_k", "seed"})


class GenerationSummary(BaseModel):
    """A generation without its text."""

    id: int
    run: int
    creator: str
    prompt: str
    parameters: dict[str, Any]
    state: str
    reason: str
    detail: str
    wanted_step: int | None
    step: int | None
    attempt: int
    worker: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None


class GenerationResource(GenerationSummary):
    """A generation; `result` is null until it has succeeded.

    It has one entry for each token, the prompt's included: ids, texts, log_probs, and experts and gates as [token][MoE layer][choice].
    """

    result: Written | None


class GenerationList(BaseModel):
    """A page of a run's generations, newest first."""

    items: list[GenerationSummary]
    next_cursor: str | None


class GenerationsQuery(Query):
    cursor: int | None = Field(None, ge=1, lt=2**63, description="Id of the last generation of the page before.")
    limit: int = Field(20, ge=1, le=100)


def summary(generation: Generation) -> dict[str, Any]:
    """The generation without its result. `creator` and `worker` should have been selected with it."""
    same = {name: getattr(generation, name) for name in COLUMNS}
    worker = generation.worker.name if generation.worker else None
    names = {"run": generation.run_id, "creator": generation.creator.get_username(), "worker": worker, "parameters": generation.parameters}
    return GenerationSummary(**same, **names).model_dump(mode="json")


class Generations(Endpoint):
    """A run's generations."""

    @extend_schema(operation_id="list_generations", parameters=parameters(GenerationsQuery), responses=GenerationList)
    def get(self, request: Request, run_id: int) -> Response:
        """Newest first, without what was written."""
        query = self.query(GenerationsQuery)
        rows = self.run(run_id).generations.defer("result").select_related("creator", "worker").order_by("-id")
        if query.cursor is not None:
            rows = rows.filter(pk__lt=query.cursor)
        page = list(rows[: query.limit + 1])
        more, page = len(page) > query.limit, page[: query.limit]
        return items([summary(row) for row in page], str(page[-1].pk) if more else None, request)

    @extend_schema(
        operation_id="generate",
        request=GenerateBody,
        parameters=[KEY],
        responses={201: GenerationResource, 200: GenerationResource},
    )
    def post(self, request: Request, run_id: int) -> Response:
        """Queues a generation. Sent again with the same Idempotency-Key and body it answers 200 with the same one."""
        key = given_key(request)
        body, run = self.body(GenerateBody), self.run(run_id)
        known = self._known(run, key, body)
        if known is not None:
            return self._answer(known, 200)
        try:
            with transaction.atomic():
                made = generate(
                    run,
                    user=self.principal.user,
                    prompt=body.prompt,
                    parameters=body.sampling(),
                    step=body.step,
                    idempotency_key=key,
                    body_sha256=_digest(run, body),
                )
        except IntegrityError:  # the same request at the same moment was faster, by the key's unique index
            known = self._known(run, key, body)
            if known is None:
                raise
            return self._answer(known, 200)
        return self._answer(made, 201)

    def _known(self, run: Run, key: str | None, body: GenerateBody) -> Generation | None:
        """The generation that this key made. Raises Problem (422) where its body was another."""
        if key is None:
            return None
        known = Generation.objects.select_related("creator", "worker").filter(creator=self.principal.user, idempotency_key=key).first()
        if known is not None and known.body_sha256 != _digest(run, body):
            said = "this Idempotency-Key was used with another body"
            raise Problem("invalid", said, [FieldError(header="Idempotency-Key", detail="Idempotency-Key: used with another body")])
        return known

    def _answer(self, generation: Generation, status: int) -> Response:
        headers = {"Location": f"/api/v1/runs/{generation.run_id}/generations/{generation.pk}"}
        return Response({**summary(generation), "result": generation.result}, status=status, headers=headers)


class OneGeneration(Endpoint):
    """One generation."""

    @extend_schema(operation_id="get_generation", responses=GenerationResource)
    def get(self, request: Request, run_id: int, generation_id: int) -> Response:
        """With the text and its routing, once it has succeeded."""
        self.query(Query)
        found = self._found(run_id, generation_id)
        return Response({**summary(found), "result": found.result})

    @extend_schema(operation_id="delete_generation", responses={204: None})
    def delete(self, request: Request, run_id: int, generation_id: int) -> Response:
        """Forgets it; a worker that is at it stops."""
        self._found(run_id, generation_id).delete()
        return Response(status=204)

    def _found(self, run_id: int, generation_id: int) -> Generation:
        found = self.run(run_id).generations.select_related("creator", "worker").filter(pk=min(generation_id, 2**63 - 1)).first()
        if found is None:
            raise Problem("not-found", f"run {run_id} has no generation {generation_id}")
        return found


def _digest(run: Run, body: GenerateBody) -> str:
    return hashlib.sha256(json.dumps([run.pk, body.model_dump()], sort_keys=True).encode()).hexdigest()
