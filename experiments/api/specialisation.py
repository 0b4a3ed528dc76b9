"""REST: what the experts of a layer specialise on, at one validation."""

from __future__ import annotations

from typing import Any

from django.http import Http404
from django.urls import path
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema
from pydantic import Field
from rest_framework.request import Request
from rest_framework.response import Response

from experiments.api.endpoint import Endpoint, Query, parameters
from experiments.telemetry import specialisation
from experiments.telemetry.specialisation import Group


class SpecialisationQuery(Query):
    step: int | None = Field(None, ge=0, lt=2**31, description="Step of the validation; the newest where absent.")
    layer: int = Field(0, ge=0, lt=100_000, description="Row of the [layer, …] tensors.")


class SpecialisationView(Endpoint):
    @extend_schema(operation_id="run_specialisation", parameters=parameters(SpecialisationQuery), responses=OpenApiTypes.OBJECT)
    def get(self, request: Request, run_id: int) -> Response:
        """For one layer after one validation: of each class of tokens and each domain, how many tokens there were and each expert's share.

        A share is N(expert, group) / N(group) (OLMoE, eq. 7); `chance`, top_k / experts, is what it is where the router makes no difference.
        """
        run = self.run(run_id)
        asked = self.query(SpecialisationQuery)
        steps = specialisation.steps(run.pk)[::-1]
        answer: dict[str, Any] = {"steps": steps, "layers": list(run.moe_layers), "chance": run.top_k / run.n_experts if run.n_experts else None}
        if not steps and asked.step is None:
            return Response({**answer, "step": None, "layer": None, "classes": [], "domains": []})
        found = specialisation.layer(run.pk, steps[-1] if asked.step is None else asked.step, asked.layer)
        if found is None:
            raise Http404
        groups = {"classes": [_plain(group) for group in found.classes], "domains": [_plain(group) for group in found.domains]}
        return Response({**answer, "step": found.step, "layer": found.row, **groups})


def _plain(group: Group) -> dict[str, Any]:
    return {"name": group.name, "tokens": group.tokens, "expert_tokens": group.taken.tolist(), "expert_share": group.share.tolist()}


urlpatterns = [path("runs/<int:run_id>/specialisation", SpecialisationView.as_view())]
