"""A key that the client chooses: a request that makes a run makes one, however often it is sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

from django.db import connection, transaction
from drf_spectacular.utils import OpenApiParameter
from rest_framework.request import Request

from experiments.api.endpoint import Endpoint
from experiments.api.problems import FieldError, Problem
from experiments.models import IdempotencyKey, Run

KEY = OpenApiParameter("Idempotency-Key", {"type": "string", "minLength": 1, "maxLength": 200}, "header")


def given_key(request: Request) -> str | None:
    """The request's Idempotency-Key. Raises Problem (400)."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not (0 < len(key) <= 200 and key.isascii() and key.isprintable()):
        detail = "Idempotency-Key: should be 1 to 200 printable ASCII characters"
        raise Problem("malformed", detail, [FieldError(header="Idempotency-Key", detail=detail)])
    return key


class MakesRuns(Endpoint):
    """An endpoint that takes an Idempotency-Key."""

    def once(self, make: Callable[[], Run], *asked: object) -> tuple[Run, bool]:
        """The run that `make` makes, and whether it did: not where the request's key has made one already.

        `asked` is what the request says beside its body. Raises Problem (400; 409 while the same key is at work; 422 for another body).
        """
        key = given_key(self.request)
        if key is None:
            return make(), True
        said = [*asked, self.request.data] if asked else self.request.data
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        with transaction.atomic():
            known = self._known(key, digest)
            if known is not None:
                return known, False
            run = make()
            IdempotencyKey.objects.create(user=self.principal.user, key=key, body_sha256=digest, run=run)
        return run, True

    def _known(self, key: str, digest: str) -> Run | None:
        """The run that this key made, if any; holds the key until the transaction ends."""
        name = hashlib.sha256(f"{self.principal.user.pk}:{key}".encode()).digest()[:8]
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [int.from_bytes(name, "big", signed=True)])
            if not cursor.fetchone()[0]:
                raise Problem("conflict", "a request with this Idempotency-Key is still being worked on; send it again in a moment")
        found = IdempotencyKey.objects.select_related("run__project", "run__owner", "run__worker").filter(user=self.principal.user, key=key).first()
        if found is not None and found.body_sha256 != digest:
            said = "this Idempotency-Key was used with another body"
            raise Problem("invalid", said, [FieldError(header="Idempotency-Key", detail="Idempotency-Key: used with another body")])
        return found.run if found else None
