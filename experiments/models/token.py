"""Secrets that let somebody in. None is stored: only SHA-256 of it."""

from __future__ import annotations

from django.conf import settings
from django.contrib.postgres.fields import ArrayField
from django.db import models

from experiments.models.project import Project


class Scope(models.TextChoices):
    """What a token may be used for. `write` includes `read`; `admin` includes both."""

    READ = "read", "Read"
    WRITE = "write", "Read and write"
    INGEST = "ingest", "Send telemetry"
    WORKER = "worker", "Take work"
    ADMIN = "admin", "Administer"


class Token(models.Model):
    """A bearer token of a user, for scripts. It can do no more than its user, and within `project` if that is set."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="tokens")
    name = models.CharField(max_length=200)
    prefix = models.CharField(max_length=16)
    sha256 = models.CharField(max_length=64, unique=True)
    scopes = ArrayField(models.CharField(max_length=8, choices=Scope))
    project = models.ForeignKey(Project, models.CASCADE, null=True, blank=True, related_name="tokens")
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    def __str__(self) -> str:
        return f"{self.prefix}… {self.name}"


class SignInTicket(models.Model):
    """A link that signs a user in once, within minutes."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="+")
    sha256 = models.CharField(max_length=64, unique=True)
    expires_at = models.DateTimeField()
    used_at = models.DateTimeField(null=True, blank=True)

    def __str__(self) -> str:
        return f"ticket of {self.user}"


class LoginThrottle(models.Model):
    """How often an account was tried in a minute. `account` is SHA-256 of the name that was typed, known or not."""

    account = models.CharField(max_length=64)
    minute = models.DateTimeField()
    tries = models.IntegerField(default=0)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["account", "minute"], name="one_count_per_account_minute")]

    def __str__(self) -> str:
        return f"{self.tries} tries at {self.minute:%H:%M}"
