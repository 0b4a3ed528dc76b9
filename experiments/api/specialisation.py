"""REST: what the experts of a layer specialise on, at one validation."""

from __future__ import annotations

from django.urls import path
from drf_spectacular.utils import extend_schema
from pydantic import BaseModel, Field
from rest_framework.request import Request
from rest_framework.response import Response

from experiments.api.endpoint import Endpoint, Query, parameters
from experiments.api.problems import Problem
from experiments.telemetry import specialisation
from experiments.telemetry.specialisation import Group


class SpecialisationQuery(Query):
    step: int | None = Field(None, ge=0, lt=2**31, description="Step of the validation; the newest where absent.")
    layer: int = Field(0, ge=0, lt=100_000, description="Row of the [layer, …] tensors.")


class GroupShares(BaseModel):
    """A class of tokens or a domain: its tokens in the validation, and how many, and what share of them, each expert took."""

    name: str
    tokens: int
    expert_tokens: list[int]
    expert_share: list[float]


class LayerShares(BaseModel):
    """One layer at one validation; `steps` are those of all validations. `step` and `layer` are null where nothing was counted yet."""

    steps: list[int]
    layers: list[int]
    chance: float | None
    step: int | None
    layer: int | None
    classes: list[GroupShares]
    domains: list[GroupShares]


class SpecialisationView(Endpoint):
    @extend_schema(operation_id="run_specialisation", parameters=parameters(SpecialisationQuery), responses=LayerShares)
    def get(self, request: Request, run_id: int) -> Response:
        """For one layer after one validation: of each class of tokens and each domain, how many tokens there were and each expert's share.

        A share is N(expert, group) / N(group) (OLMoE, eq. 7); `chance`, top_k / experts, is what it is where the router makes no difference.
        """
        run = self.run(run_id)
        asked = self.query(SpecialisationQuery)
        steps = specialisation.steps(run.pk)[::-1]
        answer = LayerShares(
            steps=steps,
            layers=run.moe_layers,
            chance=run.top_k / run.n_experts if run.n_experts else None,
            step=None,
            layer=None,
            classes=[],
            domains=[],
        )
        if not steps and asked.step is None:
            return Response(answer.model_dump())
        step = steps[-1] if asked.step is None else asked.step
        found = specialisation.layer(run.pk, step, asked.layer)
        if found is None:
            raise Problem("not-found", f"run {run_id} has no counts of the layer in row {asked.layer} after step {step}")
        groups = {"classes": [_shown(group) for group in found.classes], "domains": [_shown(group) for group in found.domains]}
        return Response(answer.model_copy(update={"step": found.step, "layer": found.row, **groups}).model_dump())


def _shown(group: Group) -> GroupShares:
    return GroupShares(name=group.name, tokens=group.tokens, expert_tokens=group.taken.tolist(), expert_share=group.share.tolist())


urlpatterns = [path("runs/<int:run_id>/specialisation", SpecialisationView.as_view())]
