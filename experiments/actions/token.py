"""Issues and revokes the tokens of users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from django.contrib.auth.models import User
from django.db.models.functions import Now

from experiments import secret
from experiments.models import Project, Token

PREFIX = "mlk_"


@dataclass(frozen=True)
class Issued:
    """A new token and its secret, which is not kept anywhere."""

    token: Token
    secret: str


def issue(*, user: User, name: str, scopes: Sequence[str], project: Project | None = None, expires_at: datetime | None = None) -> Issued:
    """A token that can do what `scopes` say, and no more than `user` can."""
    clear = secret.make(PREFIX)
    token = Token.objects.create(
        user=user,
        name=name,
        prefix=clear[: len(PREFIX) + 4],
        sha256=secret.digest(clear),
        scopes=sorted(set(scopes)),
        project=project,
        expires_at=expires_at,
    )
    return Issued(token, clear)


def revoke_named(*, user: User, name: str) -> int:
    """Revokes the user's tokens of that name; how many there were."""
    return Token.objects.filter(user=user, name=name, revoked_at=None).update(revoked_at=Now())
