"""Errors as RFC 9457 problem documents: whatever goes wrong in the API, down to a bug of our own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from django.core.exceptions import ObjectDoesNotExist, PermissionDenied, RequestDataTooBig
from django.db import DatabaseError, InterfaceError, OperationalError
from django.http import Http404
from psycopg_pool import PoolTimeout
from pydantic import BaseModel, Field, ValidationError
from rest_framework import exceptions
from rest_framework.response import Response

from experiments.actions.describe import Refused
from experiments.actions.transition import StateConflict
from spec.problems import Problem as FieldProblem
from spec.problems import name_of, pointer, said

logger = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
TITLES: Mapping[str, tuple[int, str]] = {
    "malformed": (400, "The request cannot be read"),
    "unauthenticated": (401, "Sign in, or send a token"),
    "forbidden": (403, "You may not do this"),
    "not-found": (404, "There is no such thing"),
    "method-not-allowed": (405, "This cannot be done here"),
    "conflict": (409, "The present state does not allow it"),
    "precondition-failed": (412, "It has changed since you read it"),
    "too-large": (413, "The request is too large"),
    "unsupported-media-type": (415, "The body's type is not supported"),
    "invalid": (422, "The request is not valid"),
    "too-many": (429, "Too many requests"),
    "internal": (500, "Something went wrong on our side"),
    "unavailable": (503, "The database does not answer; try again"),
}
_BY_STATUS = {status: slug for slug, (status, _) in TITLES.items()}


class FieldError(BaseModel):
    """What is at fault in the request: `pointer` into the body (RFC 6901; empty for all of it), `parameter` of the query, or `header`."""

    pointer: str | None = None
    parameter: str | None = None
    header: str | None = None
    detail: str


class ProblemDocument(BaseModel):
    """The body of every error (RFC 9457)."""

    type: str = Field(description="A URN that stays the same: `urn:moelab:problem:not-found`.")
    title: str = Field(min_length=1, description="What kind of problem it is, the same for every one of its type.")
    status: int
    detail: str = Field(min_length=1, description="What was asked for and why it cannot be had: never empty.")
    request_id: str = Field(description="As in X-Request-ID, and in the server's log.")
    errors: list[FieldError] = Field(
        default=[],
        description="What is at fault in the request, where something is. Empty where the request is well formed and the server's state decides: "
        "401, 403, 404, 405, most of 409, and 5xx.",
    )


class Problem(Exception):  # noqa: N818
    """Raise it to answer with the problem of that name."""

    def __init__(self, slug: str, detail: str = "", errors: Iterable[FieldError] = ()) -> None:
        super().__init__(detail)
        self.slug, self.detail, self.errors = slug, detail, list(errors)


def invalid_body(error: ValidationError) -> Problem:
    """422 for a body that is not of its shape."""
    return Problem("invalid", errors=[FieldError(pointer=pointer(*item["loc"]), detail=_said(item)) for item in error.errors(include_url=False)])


def invalid_query(error: ValidationError) -> Problem:
    """400 for a query that is not of its shape. A rule between parameters begins with the one at fault."""
    found = [(item["loc"], _said(item)) for item in error.errors(include_url=False)]
    return Problem("malformed", errors=[FieldError(parameter=str(loc[0]) if loc else detail.split()[0], detail=detail) for loc, detail in found])


def wrong_parameter(name: str, detail: str) -> Problem:
    """400 for one parameter of the query that does not fit what there is. `detail` names it."""
    return Problem("malformed", detail, [FieldError(parameter=name, detail=detail)])


def refused(problems: Iterable[FieldProblem]) -> Problem:
    """422 for a spec that cannot be run."""
    return Problem("invalid", errors=[FieldError(pointer=problem.pointer, detail=problem.detail) for problem in problems])


def _said(item: Mapping[str, Any]) -> str:
    message = "is not known here" if item["type"] == "extra_forbidden" else said(item).removeprefix("Value error, ")
    return f"{name_of(item['loc'])}: {message}" if item["loc"] else message


def handle(error: Exception, context: Mapping[str, Any]) -> Response:
    """DRF's exception handler: every exception becomes a problem document, and one that nobody expected is logged with its request id."""
    # Not at the top: this module of DRF loads the parsers of our settings, which need this one.
    from rest_framework.views import set_rollback

    set_rollback()
    request_id = getattr(context.get("request"), "request_id", "")
    headers: dict[str, str] = {}
    match error:
        case Problem():
            problem = error
        case Refused():
            problem = refused(error.problems)
        case StateConflict():
            problem = Problem("conflict", str(error))
        case Http404() | exceptions.NotFound() | ObjectDoesNotExist():  # or deleted since the permission was given
            problem = Problem("not-found", _missing(context))
        case PermissionDenied():
            problem = Problem("forbidden", str(error))
        case RequestDataTooBig():
            problem = Problem("too-large", "the body is larger than the server reads")
        case exceptions.UnsupportedMediaType():
            detail = "Content-Type: should be application/json"
            problem = Problem("unsupported-media-type", detail, [FieldError(header="Content-Type", detail=detail)])
        case exceptions.MethodNotAllowed():
            asked = context["request"]
            problem = Problem("method-not-allowed", f"{asked.method} is not possible at {asked.path}, only {context['view'].headers['Allow']}")
        case exceptions.APIException():
            problem = Problem(_BY_STATUS.get(error.status_code, "malformed"), str(error.detail))
            challenge = getattr(error, "auth_header", None)
            headers = {"WWW-Authenticate": challenge} if challenge else {}
        case OperationalError() | InterfaceError() | PoolTimeout():
            logger.warning("request %s: the database does not answer: %s", request_id, error)
            problem, headers = Problem("unavailable", "send it again in 2 seconds"), {"Retry-After": "2"}
        case DatabaseError() | _:
            logger.exception("request %s failed", request_id, exc_info=error)
            problem = Problem("internal", "It has been logged under this request id")
    status, title = TITLES[problem.slug]
    document = ProblemDocument(
        type=f"urn:moelab:problem:{problem.slug}",
        title=title,
        status=status,
        detail=problem.detail or "; ".join(each.detail for each in problem.errors[:3]) or title,
        request_id=request_id,
        errors=problem.errors,
    )
    return Response(document.model_dump(exclude_none=True), status=status, headers=headers, content_type=MEDIA_TYPE)


def _missing(context: Mapping[str, Any]) -> str:
    """What there is not, by the path that was asked for. To who may not see a thing it does not exist, so both are said at once."""
    found = context.get("kwargs") or {}
    for name in ("run_id", "project_id"):
        if name in found:
            return f"there is no {name.removesuffix('_id')} {found[name]}, or you may not see it"
    return f"there is nothing at {context['request'].path:.250}; GET /api/v1/schema lists what there is"
