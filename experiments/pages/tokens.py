"""One's own tokens. Making and revoking them is the API's work."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils import timezone

from experiments.access import Principal, visible_projects
from experiments.models import Scope, Token
from experiments.pages.gate import page


@page
def listing(request: HttpRequest, principal: Principal) -> HttpResponse:
    """The tokens that are not revoked, and the form for a new one."""
    tokens = list(Token.objects.select_related("project").filter(user=principal.user, revoked_at=None).order_by("-created_at"))
    now = timezone.now()
    for token in tokens:
        token.expired = token.expires_at is not None and token.expires_at < now  # type: ignore[attr-defined]
    return render(request, "pages/tokens.html", {"tokens": tokens, "scopes": Scope.choices, "projects": visible_projects(principal).order_by("name")})
