"""Who may watch. A cookie counts only from our own pages; a Bearer header from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.http.request import split_domain_port, validate_host

from experiments.access import Principal, of_websocket, visible_projects, visible_runs
from experiments.models import Scope


def own_origin(scope: Mapping[str, Any]) -> bool:
    """Whether the browser says that one of our own pages opens the socket. No Origin header means no."""
    headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
    origin, host = headers.get(b"origin", ""), headers.get(b"host", "")
    if origin in settings.CSRF_TRUSTED_ORIGINS:
        return True
    domain, _ = split_domain_port(host)
    return bool(domain) and validate_host(domain, settings.ALLOWED_HOSTS) and urlsplit(origin).netloc.lower() == host.lower()


def watcher(scope: Mapping[str, Any]) -> Principal | None:
    """The principal who opens the socket and may read; None where the socket must stay closed."""
    bearer = any(name.lower() == b"authorization" for name, _ in scope["headers"])
    principal = of_websocket(scope) if bearer or own_origin(scope) else None
    return principal if principal is not None and Scope.READ in principal.scopes else None


def may_watch(scope: Mapping[str, Any], run_id: int) -> bool:
    """Whether who opens the socket may see the run now."""
    principal = watcher(scope)
    return principal is not None and run_id < 2**63 and visible_runs(principal).filter(pk=run_id).exists()


def watched_projects(scope: Mapping[str, Any]) -> frozenset[int] | None:
    """The projects whose runs who opens the socket may see now; None for nobody."""
    principal = watcher(scope)
    return None if principal is None else frozenset(visible_projects(principal).values_list("pk", flat=True))
