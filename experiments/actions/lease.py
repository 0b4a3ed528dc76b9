"""The lease of an attempt, and its beginning."""

from __future__ import annotations

from collections.abc import Sequence

from django.db.models import F

from experiments.actions.now import after_now
from experiments.actions.transition import transition
from experiments.models import Run, State, Worker

LEASE_S = 15
HEARTBEAT_S = 3


def begin_attempt(run: Run, worker: Worker, devices: Sequence[str], token_sha256: str) -> None:
    """The queued `run`, which the caller has locked, is starting on the worker. No token has the digest "": it can still be given."""
    transition(
        run,
        State.STARTING,
        by=f"worker:{worker.name}",
        attempt=F("attempt") + 1,
        attempt_token_sha256s=[*run.attempt_token_sha256s, token_sha256],
        lease_until=after_now(LEASE_S),
        worker=worker,
        devices=list(devices),
        checkpoint_requests=0,
        exit_code=None,
        signal=None,
    )
