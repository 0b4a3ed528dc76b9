"""A generation between its queue and its end: handed to a worker, kept by heartbeats, answered or taken back.

Each claim raises `attempt`; whoever speaks with an older one is fenced. Only a worker that has the checkpoint on its disk, or in its storage, can
answer: one that has not says so, and is not asked again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.db.models import F, Q, QuerySet
from django.db.models.functions import Now

from experiments.actions.books import WORKER_SILENT_S
from experiments.actions.now import after_now
from experiments.doorbell import ring_after_commit
from experiments.models import Checkpoint, Generation, GenerationState, Run, Worker

LEASE_S = 30
HEARTBEAT_S = 5
MAX_ATTEMPTS = 3
"""Workers that may vanish over one generation before it has failed."""
PATIENCE_S = 600
"""How long a generation waits for a worker that can answer it."""


class Fenced(Exception):  # noqa: N818
    """The generation is no longer this attempt's."""


@dataclass(frozen=True)
class Offer:
    """A generation for one worker, and the checkpoint to take."""

    generation: Generation
    checkpoint: Checkpoint


@transaction.atomic
def claim_generation(runs: QuerySet[Run], *, worker: Worker) -> Offer | None:
    """The oldest generation of `runs` that this worker has not sent back; None if there is none."""
    waiting = Generation.objects.filter(state=GenerationState.QUEUED, run__in=runs).exclude(not_here__contains=[worker.pk])
    for generation in waiting.select_for_update(skip_locked=True, of=("self",)).order_by("id")[:50]:
        checkpoint = _checkpoint(generation)
        if checkpoint is None:
            _end(generation, GenerationState.FAILED, reason="checkpoint_gone", detail="newer checkpoints have replaced the one that was asked for")
            continue
        changes = {"step": checkpoint.step, "worker": worker, "attempt": F("attempt") + 1, "lease_until": after_now(LEASE_S)}
        Generation.objects.filter(pk=generation.pk).update(state=GenerationState.RUNNING, started_at=Now(), **changes)
        generation.refresh_from_db()
        return Offer(generation, checkpoint)
    return None


def _checkpoint(generation: Generation) -> Checkpoint | None:
    saved = Checkpoint.objects.filter(run=generation.run_id, deleted=False)
    if generation.wanted_step is not None:
        saved = saved.filter(step=generation.wanted_step)
    return saved.select_related("run").order_by("-step", "-attempt").first()


def renew(runs: QuerySet[Run], generation_id: int, attempt: int) -> None:
    """Extends the lease. Raises Fenced, and Generation.DoesNotExist for one of other runs."""
    with transaction.atomic():
        generation = _mine(runs, generation_id, attempt)
        Generation.objects.filter(pk=generation.pk).update(lease_until=after_now(LEASE_S))


@transaction.atomic
def succeed(runs: QuerySet[Run], generation_id: int, attempt: int, result: dict[str, Any]) -> None:
    """The worker's answer. Raises as `renew`."""
    _end(_mine(runs, generation_id, attempt), GenerationState.SUCCEEDED, result=result)


@transaction.atomic
def fail(runs: QuerySet[Run], generation_id: int, attempt: int, *, reason: str, detail: str) -> None:
    """The worker could not: it would come to the same again. Raises as `renew`."""
    _end(_mine(runs, generation_id, attempt), GenerationState.FAILED, reason=reason, detail=detail)


@transaction.atomic
def send_back(runs: QuerySet[Run], generation_id: int, attempt: int) -> None:
    """The worker does not have the checkpoint: another may. It has failed once no worker that is alive is left. Raises as `renew`."""
    generation = _mine(runs, generation_id, attempt)
    now = _checkpoint(generation)
    if generation.worker_id is not None and (now is None or now.step == generation.step):
        generation.not_here = [*generation.not_here, generation.worker_id]
    # Else it was replaced on disk while the worker looked: the same worker may have the newer one.
    alive = set(Worker.objects.filter(last_seen__gt=after_now(-WORKER_SILENT_S)).values_list("pk", flat=True))
    if alive <= set(generation.not_here) or generation.attempt >= 100:
        _end(generation, GenerationState.FAILED, not_here=generation.not_here, **_nowhere(generation))
        return
    _requeue(generation)


def take_back() -> bool:
    """Ends or queues again what its worker has left, and what has waited for too long; whether anything waits now."""
    lost = Generation.objects.filter(state=GenerationState.RUNNING, lease_until__lt=Now())
    for generation in lost.select_for_update(skip_locked=True).order_by("id")[:1000]:
        if generation.attempt - len(generation.not_here) >= MAX_ATTEMPTS:
            detail = f"{generation.attempt} attempts; the last worker was not heard from for its whole lease"
            _end(generation, GenerationState.FAILED, reason="worker_lost", detail=detail)
        else:
            _requeue(generation)
    late = Generation.objects.filter(state=GenerationState.QUEUED, created_at__lt=after_now(-PATIENCE_S))
    if Generation.objects.filter(Q(state=GenerationState.RUNNING) | Q(started_at__gt=after_now(-PATIENCE_S))).exists():
        late = late.none()  # It may only stand in a queue: a host answers one after the other, and one that was taken back may go to another.
    for generation in late.select_for_update(skip_locked=True).order_by("id")[:1000]:
        none = {"reason": "no_worker", "detail": f"no worker has taken it for {PATIENCE_S // 60} minutes"}
        _end(generation, GenerationState.FAILED, **(_nowhere(generation) if generation.not_here else none))
    return Generation.objects.filter(state=GenerationState.QUEUED).exists()


def _nowhere(generation: Generation) -> dict[str, str]:
    detail = f"no worker that is alive has the checkpoint of run {generation.run_id} at step {generation.step} on its disk, or could fetch it"
    return {"reason": "checkpoint_not_here", "detail": detail}


def _mine(runs: QuerySet[Run], generation_id: int, attempt: int) -> Generation:
    generation = Generation.objects.select_for_update().get(pk=generation_id, run__in=runs)
    if generation.attempt != attempt or generation.state != GenerationState.RUNNING:
        raise Fenced(f"generation {generation_id} is no longer attempt {attempt}'s")
    return generation


def _requeue(generation: Generation) -> None:
    changes = {"state": GenerationState.QUEUED, "worker": None, "lease_until": None, "not_here": generation.not_here}
    Generation.objects.filter(pk=generation.pk).update(**changes)
    ring_after_commit()


def _end(generation: Generation, state: str, **fields: Any) -> None:
    Generation.objects.filter(pk=generation.pk).update(state=state, ended_at=Now(), lease_until=None, **fields)
