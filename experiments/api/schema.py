"""The API about itself: OpenAPI, and what is no endpoint."""

from __future__ import annotations

from functools import cache
from typing import Any

from django.http import Http404
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from experiments.api.endpoint import Endpoint, Query
from experiments.api.problems import TITLES, ProblemDocument


@cache
def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document, with the problems that every operation may answer with."""
    document: dict[str, Any] = SchemaGenerator().get_schema(request=None, public=True)  # type: ignore[no-untyped-call]
    schemas = document["components"].setdefault("schemas", {})
    problem = ProblemDocument.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(problem.pop("$defs"))
    schemas["Problem"] = problem
    for operation in (operation for path in document["paths"].values() for operation in path.values() if isinstance(operation, dict)):
        for slug, (status, title) in TITLES.items():
            if slug not in ("too-many", "internal"):
                content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
                operation["responses"].setdefault(str(status), {"description": title, "content": content})
    return document


class OpenApi(Endpoint):
    """The description of this API."""

    @extend_schema(operation_id="get_openapi", responses={200: dict[str, Any]})
    def get(self, request: Request) -> Response:
        """OpenAPI 3.1 as JSON."""
        self.query(Query)
        return Response(openapi())


@extend_schema(exclude=True)
class Nowhere(Endpoint):
    """Every path that is no endpoint."""

    def _missing(self, request: Request) -> Response:
        raise Http404

    get = post = put = patch = delete = _missing
