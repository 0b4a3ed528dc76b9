"""Who is alive: worker hosts, and the web processes themselves."""

from __future__ import annotations

from typing import Any

from django.db import models

from experiments.models.token import Token


class Worker(models.Model):
    """A host that takes runs. `devices` is a list of {kind, index, name, memory_bytes}; `slots` runs fit on it at once; `storage` is the URL of
    the storage that it shares checkpoints in, "" for none.

    `token` is the one with which it spoke last: what that may see, the worker may take. Its user holds the name; without a token nobody does.
    """

    name = models.CharField(max_length=200, unique=True)
    host = models.CharField(max_length=200)
    pid = models.IntegerField()
    version = models.CharField(max_length=64)
    devices: models.JSONField[list[dict[str, Any]]] = models.JSONField(default=list)
    slots = models.IntegerField()
    storage = models.CharField(max_length=500, default="", blank=True)
    token = models.ForeignKey(Token, models.SET_NULL, null=True, related_name="workers")
    last_seen = models.DateTimeField()
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.name


class Presence(models.Model):
    """A web process that could write to the database without interruption from `up_since` to `last_seen`.

    Leases are judged only after such a time: whoever could not be reached cannot blame others for silence.
    """

    name = models.CharField(max_length=200, unique=True)
    up_since = models.DateTimeField()
    last_seen = models.DateTimeField()

    def __str__(self) -> str:
        return self.name
