"""An attempt at a run, from its claim to its end: who may speak for it, its lease, and what its events do to the run.

Telemetry's ingest calls these inside its transaction, which holds the lock on the run's row.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from django.db import transaction
from django.db.models.functions import Coalesce, Now

from experiments import secret
from experiments.access import authenticate_token, roles_include
from experiments.actions.lease import LEASE_S
from experiments.actions.node import Hosts, LastWord, close_nodes, hosts_of, may_speak, never_taken
from experiments.actions.now import after_now
from experiments.actions.source import UNREACHABLE
from experiments.actions.stored import is_left_behind, leave_behind
from experiments.actions.transition import locked, transition
from experiments.doorbell import ring_after_commit
from experiments.live.publish import publish_run
from experiments.models import LIVE, Checkpoint, Desired, Role, Run, Scope, State
from spec.events import CheckpointSaved, RunEnded, RunStarted

MAX_ATTEMPTS_WITHOUT_PROGRESS = 3
MAX_ATTEMPTS_NOT_TAKEN = 10
_LACKED = ("a host did not take its part", "a host could not fetch the checkpoint")
_MEND = (
    " See that the workers with this storage reach the same one, or start the worker whose disk has the checkpoint; then submit the run anew from"
    " that checkpoint (resume_from), or restart it."
)
FINAL_REASONS = frozenset({"config_invalid", "nan_loss", "oom", "error", "disk_full"})
"""Failures that would come again: the run has failed. Any other is the host's, and the run is queued again."""


@dataclass(frozen=True)
class IngestGrant:
    """The bearer may send events of this attempt. Whether the attempt still counts is for `renew_lease` to say."""

    run_id: int
    attempt: int
    is_recorder: bool
    node: int = 0
    last_word: bool = False
    """The node connects to say this alone."""


@dataclass(frozen=True)
class Command:
    """What the server wants of the attempt's supervisor."""

    desired: str
    checkpoint_requests: int
    hosts: Hosts | None = None
    """Where the attempt has several."""


def authenticate_ingest(run_id: int, attempt: int, bearer: str, node: int = 0, *, last_word: bool = False) -> IngestGrant | None:
    """The right to speak for an attempt: by the token of its claim, or (attempt 0 of a recorded run) a user's token with scope `ingest`.

    A `node` other than the first speaks for itself alone, by the token of its own claim.
    """
    if node:
        grant = IngestGrant(run_id, attempt, is_recorder=False, node=node, last_word=last_word)
        return grant if may_speak(run_id, attempt, node, bearer) else None
    run = Run.objects.filter(pk=run_id).only("id", "project_id", "recorded", "attempt_token_sha256s").first()
    if run is None:
        return None
    if run.recorded:
        principal = authenticate_token(bearer)
        allowed = principal is not None and Scope.INGEST in principal.scopes and roles_include(principal, run.project_id, Role.EDITOR)
        return IngestGrant(run_id, 0, is_recorder=True) if attempt == 0 and allowed else None
    if not 1 <= attempt <= len(run.attempt_token_sha256s):
        return None
    right = hmac.compare_digest(run.attempt_token_sha256s[attempt - 1], secret.digest(bearer))
    return IngestGrant(run_id, attempt, is_recorder=False) if right else None


def renew_lease(run_id: int, attempt: int) -> Command | None:
    """Extends the lease by LEASE_S from now and says what is wanted; None if the attempt is fenced: a later one exists, or it is over."""
    with transaction.atomic():
        mine = Run.objects.filter(pk=run_id, attempt=attempt, state__in=LIVE)
        if not mine.update(lease_until=after_now(LEASE_S)):
            return None
        desired, requests, nodes = mine.values_list("desired", "checkpoint_requests", "node_count").get()
        return Command(desired, requests, hosts_of(run_id, attempt) if nodes > 1 else None)


@transaction.atomic
def start_attempt(run_id: int, attempt: int, event: RunStarted) -> None:
    """The attempt trains: the run is running. (Ingest has archived what older attempts wrote past its checkpoint.) Ignores a fenced attempt."""
    run = locked(run_id)
    if run.attempt != attempt or run.state not in LIVE:
        return
    facts = _facts(event)
    leave_behind(run_id, attempt, event.resumed_from_step)
    if run.state == State.STARTING:
        transition(run, State.RUNNING, by=_speaker(run), started_at=Coalesce("started_at", Now()), **facts)
    else:
        Run.objects.filter(pk=run_id).update(started_at=Coalesce("started_at", Now()), updated_at=Now(), **facts)
        publish_run(run_id)


def _facts(event: RunStarted) -> dict[str, Any]:
    """What RunStarted tells about the run; what it leaves empty stays as it was submitted."""
    told = {
        "steps": event.steps,
        "total_params": event.total_params,
        "active_params": event.active_params,
        "tokens_per_step": event.tokens_per_step,
        "moe_layers": event.moe_layers,
        "n_experts": event.n_experts,
        "top_k": event.top_k,
        "phases": [name[:200] for name in event.phases],
        "balance_terms": [name[:200] for name in event.balance_terms],
        "ops": {name[:200]: value[:200] for name, value in event.ops.items()},
        "versions": {name[:200]: value[:200] for name, value in event.versions.items()},
        "device_names": [name[:200] for name in event.devices],
    }
    return {"resumed_from_step": event.resumed_from_step, "attempts_not_taken": 0, **{name: value for name, value in told.items() if value}}


@transaction.atomic
def record_checkpoint(run_id: int, attempt: int, event: CheckpointSaved) -> None:
    """Writes the checkpoint down, marks those that it replaced on disk as deleted, and counts it as progress. Twice is once.

    One that comes late, from behind where a later attempt has gone on, is written down only.
    """
    run, left = locked(run_id), is_left_behind(run_id, attempt, event.step)
    Checkpoint.objects.update_or_create(
        run=run,
        attempt=attempt,
        step=event.step,
        defaults={
            "path": event.path,
            "size_bytes": event.size_bytes,
            "sha256": event.sha256[:64],
            "seconds": event.seconds,
            "at": datetime.fromtimestamp(event.at, UTC),
            "host": run.worker.host if run.worker else "",  # whose disk has the spool that says so
            "deleted": left,
        },
    )
    if left:
        return
    kept: set[int] = set()
    keep = int(run.spec.get("training", {}).get("keep_checkpoints", 1_000_000))
    for checkpoint in Checkpoint.objects.filter(run=run, deleted=False).order_by("-step", "-attempt"):
        if checkpoint.step in kept or len(kept) == keep:
            Checkpoint.objects.filter(pk=checkpoint.pk).update(deleted=True)
        else:
            kept.add(checkpoint.step)
    if event.step > run.progress_checkpoint_step:
        Run.objects.filter(pk=run_id).update(progress_checkpoint_step=event.step, attempts_without_progress=0, updated_at=Now())
    publish_run(run_id)


@transaction.atomic
def end_attempt(run_id: int, attempt: int, event: RunEnded) -> None:
    """The attempt is over, and the run with it: succeeded, failed, cancelled, paused or queued again. Ignores a fenced attempt."""
    run = locked(run_id)
    if run.attempt != attempt or run.state not in LIVE:
        return
    by = _speaker(run)
    close_nodes(run, LastWord(event.outcome, event.reason, event.detail, event.exit_code, event.signal, event.log_tail))
    said: dict[str, Any] = {
        "reason": event.reason[:64],
        "detail": event.detail,
        "exit_code": event.exit_code,
        "signal": event.signal,
    }
    if event.outcome in ("succeeded", "cancelled"):
        transition(run, event.outcome, by=by, **said)
    elif event.outcome == "paused" and run.recorded:
        transition(run, State.CANCELLED, by=by, **said)  # Nobody here could let it go on.
    elif event.outcome == "failed" and (run.recorded or (event.reason in FINAL_REASONS and run.desired != Desired.CANCEL)):
        transition(run, State.FAILED, by=by, **said)
    else:
        leave(run, by=by, counts=event.outcome == "failed", **said)


def leave(run: Run, *, by: str, counts: bool, **said: Any) -> None:
    """An unfinished attempt has left the run (locked by the caller): it is cancelled, paused, queued again, or has failed for good.

    `counts` says whether the attempt is to blame: three in a row that crash without a new checkpoint are enough. One of which a host never
    took its part says nothing against the run, nor does one whose host could not fetch the checkpoint; but ten of them with none that trained are
    enough as well.
    """
    unreachable = said.get("reason") == UNREACHABLE
    lacking = unreachable or (counts and run.node_count > 1 and never_taken(run))
    tries = run.attempts_without_progress + (counts and not lacking)
    not_taken = run.attempts_not_taken + lacking
    tried: dict[str, Any] = {"attempts_without_progress": tries, "attempts_not_taken": not_taken}
    if run.desired == Desired.CANCEL:
        transition(run, State.CANCELLED, by=by, **{**said, "reason": "cancelled"})
    elif run.desired == Desired.PAUSE:
        transition(run, State.PAUSED, by=by, **said)
    elif tries >= MAX_ATTEMPTS_WITHOUT_PROGRESS or not_taken >= MAX_ATTEMPTS_NOT_TAKEN:
        what = f"{not_taken} attempts in which {_LACKED[unreachable]}" if lacking else f"{tries} attempts without a new checkpoint"
        text = f"{what}; the last ended with {said.get('reason') or 'no reason'}. {said.get('detail', '')}".strip() + _MEND * unreachable
        transition(run, State.FAILED, by=by, **tried, **{**said, "reason": "restart_limit", "detail": text})
    else:
        transition(run, State.QUEUED, by=by, **tried, **said)
        ring_after_commit()


def _speaker(run: Run) -> str:
    return "recorder" if run.recorded else f"worker:{run.worker.name}" if run.worker else "supervisor"
