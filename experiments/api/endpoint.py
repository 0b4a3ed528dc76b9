"""What every endpoint of the API shares: bodies and queries as pydantic models, JSON out, and a request id."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from django.http import Http404, HttpRequest
from drf_spectacular.utils import OpenApiParameter
from pydantic import BaseModel, ConfigDict, ValidationError
from rest_framework.negotiation import DefaultContentNegotiation
from rest_framework.renderers import BaseRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from experiments import access
from experiments.api.problems import FieldError, Problem, invalid_body, invalid_query
from experiments.models import Project, Role, Run
from experiments.routes import ROUTES

M = TypeVar("M", bound=BaseModel)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")


class Body(BaseModel):
    """The body of a request: a closed shape, and no value is turned into another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Query(BaseModel):
    """The parameters of a query: closed as well, read from text. A field whose type is a list may be given several times."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class JSONOut(BaseRenderer):
    """Compact JSON. No parameter of Accept changes its size."""

    media_type = "application/json"
    format = "json"
    charset = None

    def render(self, data: Any, accepted_media_type: str | None = None, renderer_context: Mapping[str, Any] | None = None) -> bytes:
        return b"" if data is None else json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class AlwaysFirst(DefaultContentNegotiation):
    """The endpoint's first renderer, whatever Accept says: there is one shape of each thing."""

    def select_renderer(self, request: Request, renderers: Any, format_suffix: str | None = None) -> Any:
        return renderers[0], renderers[0].media_type


class Endpoint(APIView):
    """A view of the API. Who may call it stands in `experiments.routes`."""

    renderer_classes = [JSONOut]
    content_negotiation_class = AlwaysFirst

    def initialize_request(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Request:
        given = request.headers.get("X-Request-ID", "")
        wrapped = super().initialize_request(request, *args, **kwargs)
        wrapped.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex  # type: ignore[attr-defined]
        return wrapped

    def finalize_response(self, request: Request, response: Any, *args: Any, **kwargs: Any) -> Any:
        response = super().finalize_response(request, response, *args, **kwargs)
        response.headers["X-Request-ID"] = getattr(request, "request_id", "")
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    @property
    def default_response_headers(self) -> dict[str, str]:
        """`Allow` has what the table of routes opens here."""
        match = self.request.resolver_match
        return {"Allow": ", ".join(ROUTES.get(match.route if match else "", {}))}

    @property
    def principal(self) -> access.Principal:
        """Who asks; the permission has made sure that there is one."""
        assert isinstance(self.request.auth, access.Principal)
        return self.request.auth

    def body(self, shape: type[M]) -> M:
        """The request's body. Raises Problem (400, 413, 415, 422)."""
        try:
            return shape.model_validate(self.request.data)
        except ValidationError as error:
            raise invalid_body(error) from error

    def query(self, shape: type[M]) -> M:
        """The query's parameters. Raises Problem (400)."""
        given = self.request.query_params
        values = {name: given.getlist(name) if name in _listed(shape) else given[name] for name in given}
        try:
            return shape.model_validate(values)
        except ValidationError as error:
            raise invalid_query(error) from error

    def run(self, run_id: int) -> Run:
        """The run, if it exists for this principal. Raises Http404."""
        run = access.visible_runs(self.principal).select_related("project", "owner", "worker").filter(pk=run_id).first()
        if run is None:
            raise Http404
        return run

    def project(self, name: str | None, role: str = Role.EDITOR) -> Project:
        """The project of that name (or the default one), in which the principal has `role`. Raises Problem (403, 422)."""
        project = Project.default() if name is None else access.visible_projects(self.principal).filter(name=name).first()
        if project is None:
            raise Problem("invalid", errors=[FieldError(pointer="/project", detail=f"project: there is no project {name} that you belong to")])
        if not access.roles_include(self.principal, project.pk, role):
            raise Problem("forbidden", f"it takes the role {role} in project {project.name}")
        return project

    @property
    def by(self) -> str:
        """The principal's name in the history of a run."""
        return f"user:{self.principal.user.get_username()}"


def items(listed: list[Any], next_cursor: str | None = None, request: Request | None = None) -> Response:
    """A list as every endpoint answers with one; the next page is also in the Link header."""
    response = Response({"items": listed, "next_cursor": next_cursor})
    if next_cursor and request is not None:
        query = request.query_params.copy()
        query["cursor"] = next_cursor
        response.headers["Link"] = f'<{request.path}?{query.urlencode()}>; rel="next"'
    return response


def parameters(shape: type[Query]) -> list[OpenApiParameter | type[Any]]:
    """The query's parameters for OpenAPI."""
    schema = shape.model_json_schema()
    required = schema.get("required", [])
    found: list[OpenApiParameter | type[Any]] = []
    for name, part in schema.get("properties", {}).items():
        described = {key: value for key, value in part.items() if key not in ("title", "description", "default")}
        found.append(OpenApiParameter(name, described, "query", required=name in required, description=part.get("description", "")))
    return found


def _listed(shape: type[BaseModel]) -> set[str]:
    return {info.alias or name for name, info in shape.model_fields.items() if _is_list(info.annotation)}


def _is_list(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _is_list(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return any(_is_list(argument) for argument in get_args(annotation))
    return get_origin(annotation) is list
