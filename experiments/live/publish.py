"""News of runs for those who watch: one Valkey stream per run, and one for all runs.

A message is a hint and the newest data; the store is the truth. What cannot be sent within 0.2 s is not sent: a second
later viewers are told that they missed something, and fill the gap from the store. Streams hold a few seconds of a run
and vanish an hour after its last word.

    moelab:run:<id>   entries {"k": kind, "d": bytes}:
                      steps   a level-1 block (spec.block) that follows the one before
                      late    a level-1 block of steps lower than the run's last
                      event   JSON of the event          log   JSON {"offset", "text"}
                      rewind  the step after which everything was archived
                      refetch the run's last step: too many steps at once to push them all
                      run     something about the run has changed
                      missed  something could not be sent
    moelab:runs       entries {"r": run id}: something about that run has changed
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import redis
from django.conf import settings
from django.db import transaction
from redis.backoff import NoBackoff
from redis.retry import Retry

log = logging.getLogger(__name__)

TIMEOUT_S = 0.15
PAUSE_S = 1.0
"""After a failure nobody tries for so long: a dead Valkey must not cost each frame its timeout."""
KEPT_BYTES, KEPT_MESSAGES = 8_000_000, 2000
FORGET_S = 3600
ALL_RUNS = "moelab:runs"


def stream_of(run_id: int) -> str:
    """The name of a run's stream."""
    return f"moelab:run:{run_id}"


@dataclass(frozen=True)
class Message:
    """One thing to tell a run's viewers."""

    kind: str
    data: bytes = b""


@functools.cache
def _client() -> redis.Redis:
    return redis.Redis.from_url(
        settings.REDIS_URL, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 0), health_check_interval=0
    )


_quiet_until = 0.0


def publish(run_id: int, messages: Sequence[Message]) -> bool:
    """Sends `messages` to the run's viewers, in order. False when Valkey could not be reached; never raises."""
    if not messages:
        return True
    if time.monotonic() >= _quiet_until and _sent(run_id, messages):
        return True
    _owe(run_id)
    return False


def _sent(run_id: int, messages: Sequence[Message]) -> bool:
    global _quiet_until
    stream = stream_of(run_id)
    largest = max(len(message.data) for message in messages)
    kept = max(20, min(KEPT_MESSAGES, KEPT_BYTES // (largest + 1)))
    try:
        pipeline = _client().pipeline(transaction=False)
        for message in messages:
            pipeline.xadd(stream, {"k": message.kind, "d": message.data}, maxlen=kept, approximate=False)
        pipeline.expire(stream, FORGET_S)
        if any(message.kind == "run" for message in messages):
            pipeline.xadd(ALL_RUNS, {"r": run_id}, maxlen=KEPT_MESSAGES, approximate=True)
        pipeline.execute()
    except (redis.RedisError, OSError) as error:
        _quiet_until = time.monotonic() + PAUSE_S
        log.warning("viewers of run %s not told: %s", run_id, error)
        return False
    return True


_owed: set[int] = set()
_owing = threading.Lock()


def _owe(run_id: int) -> None:
    """Remembers that the run's viewers have to be told that they missed something."""
    with _owing:
        first = not _owed
        _owed.add(run_id)
    if first:
        _later()


def _later() -> None:
    timer = threading.Timer(PAUSE_S, _settle)
    timer.daemon = True
    timer.start()


def _settle() -> None:
    with _owing:
        owed = list(_owed)
    for run_id in owed:
        if not _sent(run_id, [Message("missed"), Message("run")]):
            break
        with _owing:
            _owed.discard(run_id)
    with _owing:
        left = bool(_owed)
    if left:
        _later()


def publish_run(run_id: int) -> None:
    """Tells viewers that the run has changed, once the transaction has committed."""
    transaction.on_commit(lambda: publish(run_id, [Message("run")]), robust=True)
