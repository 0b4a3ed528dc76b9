"""Who may do what. Everything is closed unless `experiments.routes` opens it, for HTTP, the API and WebSockets alike.

A principal is a user, signed in or speaking through a token. It sees the runs of the projects it belongs to: to
everybody else they do not exist (404, never 403). Within a project its role decides, and a token's scopes narrow that.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user
from django.contrib.auth.models import AbstractBaseUser, AnonymousUser, User
from django.db.models import Q, QuerySet
from django.db.models.functions import Now
from django.http import HttpRequest

from experiments import secret
from experiments.actions.now import after_now
from experiments.models import Membership, Project, Role, Run, Scope, Token
from experiments.routes import OPEN, ROUTES, Need

_RANK = {Role.VIEWER: 1, Role.EDITOR: 2, Role.ADMIN: 3}
_IMPLIED: Mapping[str, frozenset[str]] = {
    Scope.READ: frozenset({Scope.READ}),
    Scope.WRITE: frozenset({Scope.READ, Scope.WRITE}),
    Scope.ADMIN: frozenset({Scope.READ, Scope.WRITE, Scope.ADMIN}),
    Scope.INGEST: frozenset({Scope.INGEST}),
    Scope.WORKER: frozenset({Scope.WORKER}),
}
_LAST_USED_EVERY_S = 60


@dataclass(frozen=True)
class Principal:
    """Who asks, and how far the way of asking reaches. `project_id` is set for a token bound to one project."""

    user: User
    scopes: frozenset[str]
    project_id: int | None = None
    token_id: int | None = None


class Verdict(enum.Enum):
    """What to answer."""

    ALLOW = "allow"
    SIGN_IN = "sign in"
    FORBID = "forbid"
    HIDE = "hide"
    NO_METHOD = "no such method"


# ----- who asks


def authenticate_token(bearer: str) -> Principal | None:
    """The principal of a user's token (`mlk_…`); None if there is no such token, or it has expired, was revoked, or its user is not active."""
    token = Token.objects.select_related("user").filter(_alive(), sha256=secret.digest(bearer)).first()
    if token is None:
        return None
    stale = Q(last_used_at=None) | Q(last_used_at__lt=after_now(-_LAST_USED_EVERY_S))
    Token.objects.filter(stale, pk=token.pk).update(last_used_at=Now())
    return _speaking_through(token)


def _speaking_through(token: Token) -> Principal:
    scopes = frozenset().union(*(_IMPLIED[scope] for scope in token.scopes))
    return Principal(token.user, scopes, token.project_id, token.pk)


def _alive() -> Q:
    return Q(revoked_at=None) & (Q(expires_at=None) | Q(expires_at__gt=Now())) & Q(user__is_active=True)


def still_counts(principal: Principal) -> bool:
    """Whether who asked some time ago could ask again: the token is not revoked or over, the user still active."""
    if principal.token_id is not None:
        return Token.objects.filter(_alive(), pk=principal.token_id).exists()
    return User.objects.filter(pk=principal.user.pk, is_active=True).exists()


def of_user(user: AbstractBaseUser | AnonymousUser) -> Principal | None:
    """The principal of a signed-in user; None for a stranger."""
    return Principal(user, _IMPLIED[Scope.ADMIN]) if isinstance(user, User) and user.is_active else None


def of_session(session_key: str | None) -> Principal | None:
    """The principal of a session cookie's value: for WebSockets, which no middleware has seen."""
    request = HttpRequest()
    request.session = import_module(settings.SESSION_ENGINE).SessionStore(session_key)
    return of_user(get_user(request))


def of_websocket(scope: Mapping[str, Any]) -> Principal | None:
    """The principal of an ASGI scope: its Bearer header if it has one, else its session cookie."""
    headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
    kind, _, bearer = headers.get(b"authorization", "").partition(" ")
    if kind:
        return authenticate_token(bearer.strip()) if kind.lower() == "bearer" else None
    cookies = dict(part.strip().partition("=")[::2] for part in headers.get(b"cookie", "").split(";"))
    return of_session(cookies.get(settings.SESSION_COOKIE_NAME))


# ----- what exists for them


def visible_projects(principal: Principal, role: str = Role.VIEWER) -> QuerySet[Project]:
    """The projects in which the principal has at least `role`."""
    projects = Project.objects.all()
    if principal.project_id is not None:
        projects = projects.filter(pk=principal.project_id)
    if principal.user.is_superuser:
        return projects
    return projects.filter(pk__in=Membership.objects.filter(user=principal.user, role__in=_at_least(role)).values("project"))


def _at_least(role: str) -> list[str]:
    return [name for name, rank in _RANK.items() if rank >= _RANK[Role(role)]]


def visible_runs(principal: Principal, role: str = Role.VIEWER) -> QuerySet[Run]:
    """The runs of these projects: where every look-up of a run begins."""
    if principal.user.is_superuser and principal.project_id is None:
        return Run.objects.all()
    return Run.objects.filter(project__in=visible_projects(principal, role))


def projects_of_workers(token_ids: Iterable[int]) -> dict[int, frozenset[int]]:
    """For each of these tokens that a worker could claim with today, the projects whose runs it would be offered: `visible_projects` as an editor.

    In three queries, however many tokens there are: this is asked while claims wait.
    """
    tokens = list(Token.objects.select_related("user").filter(_alive(), pk__in=token_ids, scopes__contains=[Scope.WORKER]))
    members = {token.user_id for token in tokens if not token.user.is_superuser}
    editing: dict[int, set[int]] = {user_id: set() for user_id in members}
    for user_id, project_id in Membership.objects.filter(user__in=members, role__in=_at_least(Role.EDITOR)).values_list("user_id", "project_id"):
        editing[user_id].add(project_id)
    everything = set(Project.objects.values_list("pk", flat=True)) if any(token.user.is_superuser for token in tokens) else set()
    found = {token: everything if token.user.is_superuser else editing[token.user_id] for token in tokens}
    return {token.pk: frozenset(ids if token.project_id is None else ids & {token.project_id}) for token, ids in found.items()}


def roles_include(principal: Principal, project_id: int, role: str) -> bool:
    """Whether the principal has at least `role` in the project."""
    return visible_projects(principal, role).filter(pk=project_id).exists()


def is_administrator(principal: Principal) -> bool:
    """Whether the principal may see and change what belongs to no project: a superuser, through a session or an unbound token."""
    return principal.user.is_superuser and principal.project_id is None


# ----- the decision


def decide(principal: Principal | None, route: str, method: str, kwargs: Mapping[str, Any]) -> Verdict:
    """What to answer to `method` on `route` (the resolver's pattern): the one place where HTTP is let through."""
    if route in OPEN:
        return Verdict.ALLOW
    if principal is None:
        return Verdict.SIGN_IN
    need = ROUTES.get(route, {}).get("GET" if method == "HEAD" else method)
    if need is None:
        return Verdict.NO_METHOD if route in ROUTES else Verdict.HIDE
    if need.scope not in principal.scopes:
        return Verdict.FORBID
    return _within(principal, need, kwargs)


def wanting(principal: Principal, route: str, method: str) -> str:
    """What the principal whom `decide` forbids `method` on `route` would need."""
    need = ROUTES[route]["GET" if method == "HEAD" else method]
    if need.scope not in principal.scopes:
        return f"it takes a token with the scope {need.scope}; this one has {', '.join(sorted(principal.scopes))}"
    return "it takes an administrator, and no token bound to a project" if need.superuser else f"it takes the role {need.role} in the project"


def _within(principal: Principal, need: Need, kwargs: Mapping[str, Any]) -> Verdict:
    if need.superuser:
        return Verdict.ALLOW if is_administrator(principal) else Verdict.FORBID
    if need.role is None:
        return Verdict.ALLOW
    project_id = kwargs.get("project_id")
    if "run_id" in kwargs:
        project_id = visible_runs(principal).filter(pk=_bigint(kwargs["run_id"])).values_list("project_id", flat=True).first()
    elif project_id is None:
        return Verdict.ALLOW  # The project is in the body: the view asks `roles_include` itself.
    if project_id is None or not roles_include(principal, _bigint(project_id), Role.VIEWER):
        return Verdict.HIDE
    return Verdict.ALLOW if roles_include(principal, _bigint(project_id), need.role) else Verdict.FORBID


def _bigint(number: int) -> int:
    """The id, or one that no row has where PostgreSQL could not hold it."""
    return number if number < 2**63 else -1
