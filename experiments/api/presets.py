"""What can be run: presets, the schema of a spec, and prices."""

from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema
from pydantic import BaseModel
from rest_framework.request import Request
from rest_framework.response import Response

from experiments.actions.describe import Refused, below
from experiments.api.endpoint import Endpoint, Query, items
from experiments.api.problems import Problem
from experiments.api.shapes import BaselineBody, Described
from spec import presets
from spec.accounting import price
from spec.baseline import NoBaselineError, dense_baseline
from spec.experiment import ExperimentSpec


class PresetResource(presets.Description):
    """A preset with its spec and price."""

    spec: dict[str, Any]
    price: dict[str, Any]


class PresetList(BaseModel):
    """Every preset, the small ones first."""

    items: list[presets.Description]
    next_cursor: None


class Presets(Endpoint):
    """Published architectures, and small ones that train on a laptop."""

    @extend_schema(operation_id="list_presets", responses=PresetList)
    def get(self, request: Request) -> Response:
        """Names, titles and sources."""
        self.query(Query)
        return items([presets.describe(name).model_dump(mode="json") for name in presets.names()])


class OnePreset(Endpoint):
    """A preset."""

    @extend_schema(operation_id="get_preset", responses=PresetResource)
    def get(self, request: Request, name: str) -> Response:
        """With its whole spec and what it costs."""
        self.query(Query)
        try:
            spec, described = presets.load(name), presets.describe(name)
        except presets.UnknownPresetError as error:
            raise Problem("not-found", str(error)) from error
        return Response({**described.model_dump(mode="json"), "spec": spec.model_dump(mode="json"), "price": price(spec).model_dump()})


class PriceOf(Endpoint):
    """What a description costs."""

    @extend_schema(operation_id="price", request=Described, responses={200: dict[str, Any]})
    def post(self, request: Request) -> Response:
        """Parameters, FLOPs and bytes, of any size and whether or not it can be trained here."""
        return Response(price(self.body(Described).experiment()).model_dump())


class Baseline(BaseModel):
    """A dense spec, what it costs, and what the spec costs that it is to be compared with."""

    spec: dict[str, Any]
    price: dict[str, Any]
    compared_with: dict[str, Any]


class DenseBaseline(Endpoint):
    """The dense model to compare a Mixture of Experts with."""

    @extend_schema(operation_id="dense_baseline", request=BaselineBody, responses=Baseline)
    def post(self, request: Request) -> Response:
        """The same spec with every layer dense, as wide as costs the same, and the prices of both."""
        body = self.body(BaselineBody)
        spec = body.experiment()
        try:
            dense = dense_baseline(spec, body.equal)
        except NoBaselineError as error:
            raise Refused(below("/spec", error.problems)) from error
        return Response({"spec": dense.model_dump(mode="json"), "price": price(dense).model_dump(), "compared_with": price(spec).model_dump()})


class SpecSchema(Endpoint):
    """The language of experiments."""

    @extend_schema(operation_id="get_spec_schema", responses={200: dict[str, Any]})
    def get(self, request: Request) -> Response:
        """JSON Schema of a spec: every field with its range, unit and help."""
        self.query(Query)
        return Response(ExperimentSpec.model_json_schema())
