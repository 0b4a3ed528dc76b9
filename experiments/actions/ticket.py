"""Sign-in tickets: a link that `moelab up` prints, good once and for ten minutes."""

from __future__ import annotations

from django.contrib.auth.models import User
from django.db.models.functions import Now
from django.urls import reverse

from experiments import secret
from experiments.actions.now import after_now
from experiments.models import SignInTicket

VALID_S = 600


def make(user: User) -> str:
    """The path of a new ticket's link, to be put behind the server's address."""
    SignInTicket.objects.filter(expires_at__lt=after_now(-VALID_S)).delete()
    clear = secret.make("")
    SignInTicket.objects.create(user=user, sha256=secret.digest(clear), expires_at=after_now(VALID_S))
    return reverse("sign-in-ticket", args=[clear])


def redeem(clear: str) -> User | None:
    """The user whom the ticket signs in, once; None if it is unknown, used or too old. Exactly one of two at once gets the user."""
    fresh = SignInTicket.objects.filter(sha256=secret.digest(clear), used_at=None, expires_at__gt=Now())
    if not fresh.update(used_at=Now()):
        return None
    user = SignInTicket.objects.select_related("user").get(sha256=secret.digest(clear)).user
    return user if user.is_active else None
