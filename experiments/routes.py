"""Every route and what it takes: the committed table. A route without a row is closed, and a test walks all of them.

Keys are the resolver's own patterns. A role is held in the run or project that the path names; where it names none, in
the project that the body names (the view asks), or, for lists, it filters what is listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.models import Role, Scope


@dataclass(frozen=True)
class Need:
    """The scope that a token must have, and the role; `superuser` is for what belongs to no project."""

    scope: str
    role: str | None = None
    superuser: bool = False


USER = Need(Scope.READ)
VIEW = Need(Scope.READ, Role.VIEWER)
EDIT = Need(Scope.WRITE, Role.EDITOR)
ADMIN = Need(Scope.ADMIN, Role.ADMIN)
OWN = Need(Scope.ADMIN)
"""Things of one's own account: any role, but not with a token that could not have made them."""
SUPERUSER = Need(Scope.ADMIN, superuser=True)
WORK = Need(Scope.WORKER)

OPEN: Mapping[str, str] = {
    "healthz": "says only that the process answers",
    "readyz": "says only which of its servers answer",
    "login": "asks who you are",
    "login/ticket/<str:ticket>": "the ticket is the secret",
}

_RUN = "api/v1/runs/<int:run_id>"

ROUTES: Mapping[str, Mapping[str, Need]] = {
    "api/v1/runs": {"GET": VIEW, "POST": EDIT},
    "api/v1/runs/validate": {"POST": USER},
    "api/v1/runs/record": {"POST": EDIT},
    "api/v1/runs/bulk": {"POST": EDIT},
    _RUN: {"GET": VIEW, "PATCH": EDIT, "DELETE": ADMIN},
    f"{_RUN}/cancel": {"POST": EDIT},
    f"{_RUN}/pause": {"POST": EDIT},
    f"{_RUN}/resume": {"POST": EDIT},
    f"{_RUN}/restart": {"POST": EDIT},
    f"{_RUN}/checkpoint": {"POST": EDIT},
    f"{_RUN}/clone": {"POST": EDIT},
    f"{_RUN}/transitions": {"GET": VIEW},
    f"{_RUN}/nodes": {"GET": VIEW},
    f"{_RUN}/checkpoints": {"GET": VIEW},
    f"{_RUN}/diff": {"GET": VIEW},
    f"{_RUN}/events": {"GET": VIEW},
    f"{_RUN}/logs": {"GET": VIEW},
    f"{_RUN}/logs/follow": {"GET": VIEW},
    f"{_RUN}/metrics": {"GET": VIEW},
    f"{_RUN}/metrics/<path:name>": {"GET": VIEW},
    f"{_RUN}/steps": {"GET": VIEW},
    f"{_RUN}/routing": {"GET": VIEW},
    f"{_RUN}/specialisation": {"GET": VIEW},
    f"{_RUN}/placement": {"GET": VIEW},
    f"{_RUN}/export/<str:file>": {"GET": VIEW},
    f"{_RUN}/generations": {"GET": VIEW, "POST": EDIT},
    f"{_RUN}/generations/<int:generation_id>": {"GET": VIEW, "DELETE": EDIT},
    "api/v1/price": {"POST": USER},
    "api/v1/specs/dense-baseline": {"POST": USER},
    "api/v1/import-config": {"POST": USER},
    "api/v1/presets": {"GET": USER},
    "api/v1/presets/<str:name>": {"GET": USER},
    "api/v1/schema": {"GET": USER},
    "api/v1/schema/spec": {"GET": USER},
    "api/v1/docs": {"GET": USER},
    "api/v1/me": {"GET": USER},
    "api/v1/system": {"GET": USER},
    "api/v1/workers": {"GET": USER},
    "api/v1/workers/<int:worker_id>/release": {"POST": SUPERUSER},
    "api/v1/worker/hello": {"POST": WORK},
    "api/v1/worker/claim": {"POST": WORK},
    "api/v1/worker/generations/claim": {"POST": WORK},
    "api/v1/worker/generations/<int:generation_id>/heartbeat": {"POST": WORK},
    "api/v1/worker/generations/<int:generation_id>/answer": {"POST": WORK},
    "api/v1/projects": {"GET": USER, "POST": SUPERUSER},
    "api/v1/projects/<int:project_id>/members": {"GET": VIEW, "PUT": ADMIN},
    "api/v1/projects/<int:project_id>/members/<int:user_id>": {"DELETE": ADMIN},
    "api/v1/tokens": {"GET": OWN, "POST": OWN},
    "api/v1/tokens/<int:token_id>": {"DELETE": OWN},
    "": {"GET": USER},
    "logout": {"POST": USER},
    "runs": {"GET": VIEW},
    "runs/new": {"GET": USER},
    "runs/compare": {"GET": VIEW},
    "runs/<int:run_id>": {"GET": VIEW},
    "runs/<int:run_id>/": {"GET": VIEW},
    "runs/<int:run_id>/row": {"GET": VIEW},
    "runs/<int:run_id>/generate": {"GET": VIEW},
    "runs/<int:run_id>/panel/<str:panel>": {"GET": VIEW},
    "presets": {"GET": USER},
    "presets/<str:name>": {"GET": USER},
    "methods": {"GET": USER},
    "workers": {"GET": USER},
    "tokens": {"GET": OWN},
}

WEBSOCKETS: Mapping[str, Need] = {
    "ws/ingest/<int:run_id>/": Need(Scope.INGEST, Role.EDITOR),
    "ws/runs/": VIEW,
    "ws/runs/<int:run_id>/": VIEW,
}
