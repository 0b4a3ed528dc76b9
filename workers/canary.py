"""A worker can go deaf: after its broker came back, the process lives and consumes nothing (celery issues 8030, 10205, 10302).

So each worker listens on a queue of its own as well, rings there every RING_S seconds, and ends itself when it has rung for
DEAF_S seconds without hearing anything. Whoever keeps it running (`moelab up`, systemd, Docker) starts it again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

from celery import Celery
from celery.signals import celeryd_after_setup, task_received, worker_ready
from kombu import Queue

RING_S = 15.0
DEAF_S = 60.0
EXIT_DEAF = 75
_ONE_MORE_TRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
BELL = "workers.look_for_work"

logger = logging.getLogger(__name__)


class Canary:
    """Rings one worker's own queue and listens for any task."""

    def __init__(self, app: Celery, queue: str) -> None:
        self._app, self._queue = app, queue
        self._rung_since: float | None = None

    def heard(self, **_: Any) -> None:
        """The worker has received a task, of whichever queue."""
        self._rung_since = None

    def ring(self) -> None:
        """Rings once. A broker that is away does not count against the worker."""
        try:
            self._app.send_task(BELL, queue=self._queue, expires=DEAF_S, ignore_result=True, retry=True, retry_policy=_ONE_MORE_TRY)
        except Exception as error:  # the transports have errors of many classes; each means that the bell was not rung
            logger.warning("the broker is away: %s", error)
            self._rung_since = None
            return
        if self._rung_since is None:
            self._rung_since = time.monotonic()

    @property
    def deaf(self) -> bool:
        """Whether bells that were rung have gone unheard for too long."""
        return self._rung_since is not None and time.monotonic() - self._rung_since > DEAF_S

    def watch(self) -> None:
        """Rings for ever, the first time at once, so that a new worker is known and takes work; ends the process once it is deaf."""
        while not self.deaf:
            self.ring()
            time.sleep(RING_S)
        logger.error("no task received for %.0f s although the bell was rung: this worker is deaf, and ends", DEAF_S)
        logging.shutdown()
        os._exit(EXIT_DEAF)


def install(app: Celery) -> None:
    """Gives the worker that is about to start its own queue, and a canary on it."""

    def add_queue(sender: str, instance: Any, **_: Any) -> None:
        app.amqp.queues.select_add(Queue(f"{BELL}.{sender}", routing_key=f"{BELL}.{sender}"))

    def start(sender: Any, **_: Any) -> None:
        canary = Canary(app, f"{BELL}.{sender.hostname}")
        task_received.connect(canary.heard, weak=False)
        threading.Thread(target=canary.watch, name="canary", daemon=True).start()

    celeryd_after_setup.connect(add_queue, weak=False)
    worker_ready.connect(start, weak=False)
