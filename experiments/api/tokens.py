"""One's own tokens."""

from __future__ import annotations

from datetime import UTC, datetime

from django.db.models import QuerySet
from django.db.models.functions import Coalesce, Now
from drf_spectacular.utils import extend_schema
from pydantic import BaseModel
from rest_framework.request import Request
from rest_framework.response import Response

from experiments import access
from experiments.actions.token import issue
from experiments.api.endpoint import Endpoint, Query, items
from experiments.api.problems import FieldError, Problem
from experiments.api.resources import NewTokenResource, TokenResource, token_json
from experiments.api.shapes import TokenBody
from experiments.models import Project, Role, Scope, Token


class TokenList(BaseModel):
    """One's tokens, newest first."""

    items: list[TokenResource]
    next_cursor: None


def own_tokens(principal: access.Principal) -> QuerySet[Token]:
    """The tokens that the principal may list and revoke: the user's, and through a bound token only those of its project."""
    tokens = Token.objects.filter(user=principal.user).select_related("project")
    return tokens if principal.project_id is None else tokens.filter(project=principal.project_id)


class Tokens(Endpoint):
    """Bearer tokens for scripts."""

    @extend_schema(operation_id="list_tokens", responses=TokenList)
    def get(self, request: Request) -> Response:
        """One's own, revoked ones included; never a secret."""
        self.query(Query)
        return items([token_json(row) for row in own_tokens(self.principal).order_by("-id")[:1000]])

    @extend_schema(operation_id="create_token", request=TokenBody, responses={201: NewTokenResource})
    def post(self, request: Request) -> Response:
        """A new token. Its secret is in this answer and in no other."""
        body = self.body(TokenBody)
        issued = issue(
            user=self.principal.user,
            name=body.name,
            scopes=body.scopes,
            project=self._bound_to(body),
            expires_at=_in_the_future(body.expires_at),
        )
        return Response(token_json(issued.token, issued.secret), status=201)

    def _bound_to(self, body: TokenBody) -> Project | None:
        """The project of the new token. Raises Problem: nobody can make a token that reaches further than they do."""
        principal = self.principal
        role = Role.ADMIN if Scope.WORKER in body.scopes else Role.VIEWER
        if body.project is not None:
            return self.project(body.project, role)
        if principal.project_id is not None:
            return self.project(Project.objects.get(pk=principal.project_id).name, role)
        if Scope.WORKER in body.scopes and not access.is_administrator(principal):
            detail = "project: a worker's token of yours is for one project that you administer"
            raise Problem("invalid", errors=[FieldError(pointer="/project", detail=detail)])
        return None


class OneToken(Endpoint):
    """A token."""

    @extend_schema(operation_id="revoke_token", responses={204: None})
    def delete(self, request: Request, token_id: int) -> Response:
        """Revokes it, at once and for good. Again is harmless."""
        if token_id >= 2**63 or not own_tokens(self.principal).filter(pk=token_id).update(revoked_at=Coalesce("revoked_at", Now())):
            raise Problem("not-found", f"you have no token {token_id}")
        return Response(status=204)


def _in_the_future(moment: datetime | None) -> datetime | None:
    if moment is None:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if moment <= datetime.now(UTC):
        raise Problem("invalid", errors=[FieldError(pointer="/expires_at", detail="expires_at: lies in the past")])
    return moment
