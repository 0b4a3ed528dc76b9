"""The API's only permission: what `experiments.access.decide` says of the route."""

from __future__ import annotations

from typing import Any

from django.http import Http404
from rest_framework import exceptions
from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from experiments.access import Principal, Verdict, decide, wanting


class ByTable(BasePermission):
    """Lets through what `experiments.routes` opens for this principal; raises 401, 403, 404 or 405 for all else."""

    def has_permission(self, request: Request, view: Any) -> bool:
        match, principal = request.resolver_match, request.auth
        verdict = decide(principal if isinstance(principal, Principal) else None, match.route if match else "", request.method or "", view.kwargs)
        if verdict is Verdict.ALLOW:
            return True
        if verdict is Verdict.SIGN_IN:
            raise exceptions.NotAuthenticated
        if verdict is Verdict.HIDE:
            raise Http404
        if verdict is Verdict.NO_METHOD:
            raise exceptions.MethodNotAllowed(request.method or "")
        assert isinstance(principal, Principal)
        raise exceptions.PermissionDenied(wanting(principal, match.route if match else "", request.method or ""))
