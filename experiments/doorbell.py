"""The doorbell: a Celery message that makes workers ask for work. Losing, doubling or delaying it changes no outcome."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

from celery import Celery
from django.conf import settings
from django.db import transaction
from kombu.exceptions import OperationalError

from experiments.models import Worker

TASK = "workers.look_for_work"
QUEUE = "work"
_TIMEOUT_S = 0.2
logger = logging.getLogger(__name__)


@cache
def _publisher(broker_url: str) -> Celery:
    """An app that only sends. The app that consumes is the workers' own; the two share names, not code."""
    app = Celery("moelab-doorbell", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        task_ignore_result=True,
        broker_connection_timeout=_TIMEOUT_S,
        broker_transport_options={"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S, "retry_on_timeout": False},
    )
    return app


def ring(queue: str = QUEUE) -> bool:
    """Rings now, one of all workers or the one of that queue; False (and a line in the log) if the broker does not take the message in time."""
    try:
        # One more try at once: the first may meet a connection that a broker's restart has cut.
        _publisher(settings.CELERY_BROKER_URL).send_task(
            TASK, queue=queue, ignore_result=True, expires=60, retry=True, retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0}
        )
    except (OperationalError, OSError) as error:
        logger.warning("the workers' bell cannot be rung, they will be called again: %s", error)
        return False
    return True


_ringer = ThreadPoolExecutor(1, thread_name_prefix="doorbell")
_pending: Future[bool] | None = None


def ring_after_commit() -> None:
    """Rings once the transaction has committed; never if it rolls back. Nobody waits for it: a broker that hangs delays no answer."""
    transaction.on_commit(_ring_soon, robust=True)


def _ring_soon() -> None:
    global _pending
    # A ring that has not begun yet will be heard after this commit: it is enough.
    if _pending is None or _pending.running() or _pending.done():
        _pending = _ringer.submit(ring)


def ring_workers_after_commit(workers: Sequence[Worker]) -> None:
    """Rings each worker's own bell once the transaction has committed (workers.canary: a queue that it alone listens to)."""
    queues = [f"{TASK}.{worker.name}@{worker.host}" for worker in workers]
    transaction.on_commit(lambda: [_ringer.submit(ring, queue) for queue in queues], robust=True)
