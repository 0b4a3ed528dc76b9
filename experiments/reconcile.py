"""Repairs what messages and processes have lost: rings again for queued runs, and takes back the leases of dead attempts.

A thread of each web process does it, every 10 s, one process at a time. No lease is judged until some web process has
been up, and in touch with the database, for 20 s without a gap: after an outage the supervisors must get to say so first.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time

from django.db import DatabaseError, connection, transaction
from django.db.models import Case, F, Q, When
from django.db.models.functions import Now

from experiments import doorbell
from experiments.actions.attempt import leave
from experiments.actions.node import LastWord, close_nodes, lose_silent_nodes
from experiments.actions.now import after_now
from experiments.actions.serve_generation import take_back
from experiments.actions.transition import StateConflict, transition
from experiments.models import LIVE, Presence, Run, State

EVERY_S = 10.0
PRESENCE_EVERY_S = 2.0
GAP_S = 6
"""A presence that could not be written for so long has been interrupted."""
TRUSTED_AFTER_S = 20
RECORDER_SILENT_S = 60
_LOCK = 0x6D6F656C
logger = logging.getLogger(__name__)


def process_name() -> str:
    """A name for this web process that no other has, now or later."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


def keep_presence(name: str) -> None:
    """Says that this process is up and reaches the database; after a gap it counts as newly up. Forgets processes of yesterday."""
    with transaction.atomic():
        up_since = Case(When(last_seen__lt=after_now(-GAP_S), then=Now()), default=F("up_since"))
        if not Presence.objects.filter(name=name).update(up_since=up_since, last_seen=Now()):
            Presence.objects.create(name=name, up_since=Now(), last_seen=Now())
            Presence.objects.filter(last_seen__lt=after_now(-86_400)).delete()


def reconcile_once() -> list[int]:
    """One round: the ids of the runs that lost their attempt. Does nothing if another process is at it."""
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [_LOCK])
            if not cursor.fetchone()[0]:
                return []
        trusted = _trusted()
        lost = _take_back() if trusted else []
        if trusted and (without_node := lose_silent_nodes()):
            logger.warning("runs that lost a host: %s", without_node)
        waiting = trusted and take_back()
        queued = Run.objects.filter(state=State.QUEUED).exists()
    if queued or waiting:
        doorbell.ring()
    return lost


def _trusted() -> bool:
    return Presence.objects.filter(up_since__lt=after_now(-TRUSTED_AFTER_S), last_seen__gt=after_now(-GAP_S)).exists()


def _take_back() -> list[int]:
    silent = Q(recorded=False, lease_until__lt=Now())
    # Nobody can start a recorded run again: it is ended only if its cancelling is not answered.
    unanswered = Q(recorded=True, state=State.STOPPING, updated_at__lt=after_now(-RECORDER_SILENT_S))
    unanswered &= Q(lease_until=None) | Q(lease_until__lt=after_now(-RECORDER_SILENT_S))
    expired = Run.objects.select_for_update(skip_locked=True, of=("self",)).filter(silent | unanswered, state__in=LIVE)
    lost = []
    for run in expired.select_related("worker").order_by("id")[:1000]:
        who = run.worker.name if run.worker else "its trainer"
        try:
            if run.recorded:
                transition(run, State.CANCELLED, by="reconciler", reason="cancelled", detail=f"{who} did not answer")
            else:
                detail = f"attempt {run.attempt} on {who} was not heard from for its whole lease"
                close_nodes(run, LastWord("failed", "worker_lost", detail))
                leave(run, by="reconciler", counts=True, reason="worker_lost", detail=detail)
        except StateConflict as conflict:
            logger.warning("%s", conflict)
            continue
        lost.append(run.pk)
    if lost:
        logger.warning("runs that lost their attempt: %s", lost)
    return lost


def run_forever(stop: threading.Event) -> None:
    """Keeps this process's presence and reconciles until `stop` is set. A database that is away is waited for."""
    name, next_round = process_name(), time.monotonic() + EVERY_S
    while not stop.wait(PRESENCE_EVERY_S):
        try:
            keep_presence(name)
            if time.monotonic() >= next_round:
                next_round = time.monotonic() + EVERY_S
                reconcile_once()
        except DatabaseError as error:
            logger.warning("cannot reconcile while the database is away: %s", error)
        except Exception:
            logger.exception("a round of reconciliation failed")
        finally:
            connection.close()
