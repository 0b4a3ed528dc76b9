"""Whether this process lives, and whether it can do its work: open to everybody, and silent about anything else."""

from __future__ import annotations

import logging

import redis
from django.conf import settings
from django.db import DatabaseError, connection
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.http import require_safe
from psycopg_pool import PoolTimeout
from redis.backoff import NoBackoff
from redis.retry import Retry

_TIMEOUT_S = 0.3
logger = logging.getLogger(__name__)


def database_answers() -> bool:
    """Whether PostgreSQL answers."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except (DatabaseError, PoolTimeout) as error:
        logger.warning("the database does not answer: %s", error)
        return False
    return True


def valkey_answers() -> bool:
    """Whether Valkey answers within 0.3 s."""
    try:
        with redis.Redis.from_url(
            settings.REDIS_URL, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, retry=Retry(NoBackoff(), 0)
        ) as client:
            return bool(client.ping())
    except (redis.RedisError, OSError):
        return False


@require_safe
def healthz(request: HttpRequest) -> JsonResponse:
    """200: the process answers."""
    return JsonResponse({"status": "ok"})


@require_safe
def readyz(request: HttpRequest) -> JsonResponse:
    """200 `ok`, 200 `degraded` (without Valkey: live views stand still, all else works), or 503 `down` without the database."""
    database, valkey = database_answers(), valkey_answers()
    status = "ok" if database and valkey else "degraded" if database else "down"
    answers = {"status": status, "database": "ok" if database else "down", "valkey": "ok" if valkey else "down"}
    return JsonResponse(answers, status=200 if database else 503)


urlpatterns = [path("healthz", healthz, name="healthz"), path("readyz", readyz, name="readyz")]
