"""Gathers the hosts of a run that wants several. Each worker that asks keeps a place, with its devices, for at most GATHER_S; the one
that completes the run grants it to all of them in one transaction. A gathering that stays incomplete lets go of all its places at
once, so that two half-gathered runs never wait for each other: whoever asks then begins again with the most urgent, oldest run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from django.db.models import F, Q, QuerySet
from django.db.models.functions import Now

from experiments import secret
from experiments.actions.books import WORKER_SILENT_S, Books
from experiments.actions.lease import LEASE_S, begin_attempt
from experiments.actions.now import after_now
from experiments.actions.transition import locked
from experiments.doorbell import ring_workers_after_commit
from experiments.models import LIVE, Node, Run, State, Worker

GATHER_S = 12
PATIENCE_S = 300
"""A run that has been queued for so long is gathered although some hosts are busy: those that are free keep their devices for it."""


class Part(NamedTuple):
    """A worker's part in a granted run, and the token with which its supervisor speaks."""

    node: Node
    token: str


def let_go(worker: Worker) -> None:
    """Gives up the worker's places whose time is over, or whose run waits no more. One that is being granted at this moment is left to that."""
    places = Node.objects.select_for_update(skip_locked=True, of=("self",)).filter(worker=worker, attempt=0)
    over = places.filter(Q(lease_until__lt=Now()) | ~Q(run__state=State.QUEUED))
    Node.objects.filter(pk__in=[node.pk for node in over]).delete()


def places_of(worker: Worker) -> int:
    """Slots that are kept for runs of which the worker does not know yet."""
    return Node.objects.filter(worker=worker, attempt=0).count()


def join(run: Run, worker: Worker, devices: Sequence[str], books: Books) -> None:
    """Keeps a place in `run`, which the caller has locked, unless its other hosts cannot be had; the last one grants the run to all."""
    places = Node.objects.filter(run=run, attempt=0)
    over = places.select_for_update(skip_locked=True, of=("self",)).filter(lease_until__lt=Now())  # one that is locked its own worker gives up
    Node.objects.filter(pk__in=[node.pk for node in over]).delete()
    kept = list(places.select_for_update(of=("self",)).filter(lease_until__gte=Now()).select_related("worker").order_by("pk"))
    kind = _kind(devices)
    if any(node.worker_id == worker.pk or _kind(node.devices) != kind for node in kept):
        return
    here = [*(node.worker for node in kept), worker]
    others = _others(run, kind, here, books)
    home = _home(run)
    begins_here = not home or home in {member.host for member in here}
    lacking = run.node_count - len(here)
    if lacking > len(others) or (not begins_here and (not lacking or home not in {other.host for other in others})):
        return
    until = kept[0].lease_until if kept else after_now(GATHER_S)
    kept.append(Node.objects.create(run=run, worker=worker, devices=list(devices), lease_until=until))
    if lacking:
        ring_workers_after_commit(others)
    else:
        _grant(run, sorted(kept, key=lambda node: node.worker.host != home))
        ring_workers_after_commit(here[:-1])


def _kind(devices: Sequence[str]) -> str:
    return devices[0].partition(":")[0]


def _others(run: Run, kind: str, without: Sequence[Worker], books: Books) -> list[Worker]:
    """Workers that are alive and could be hosts of the run: now or, where it has been queued for long, once they are free."""
    recent = run.transitions.filter(to_state=State.QUEUED, at__gt=after_now(-PATIENCE_S)).exists()
    return [worker for worker in books.workers if worker not in without and books.could_take(worker, run, kind, now=recent)]


def _home(run: Run) -> str:
    """The host on which node 0 can read the checkpoint that the run goes on from, its own or another's; "" where none is, or it is away."""
    begins_with = run.spec.get("start", {}).get("run")
    if run.progress_checkpoint_step:
        host = run.worker.host if run.worker else ""
    elif run.resume_from:
        host = str(run.resume_from.get("host") or "")
    else:
        origin = Run.objects.select_related("worker").filter(pk=begins_with).first() if begins_with else None
        host = origin.worker.host if origin and origin.worker else ""
    alive = Worker.objects.filter(host=host, last_seen__gt=after_now(-WORKER_SILENT_S)).exists()
    return host if alive else ""


def _grant(run: Run, nodes: Sequence[Node]) -> None:
    """The run is starting on all of them; the first is node 0. Each worker hears of it when it asks."""
    begin_attempt(run, nodes[0].worker, nodes[0].devices, "")
    for rank, node in enumerate(nodes):
        Node.objects.filter(pk=node.pk).update(attempt=run.attempt, rank=rank, lease_until=after_now(LEASE_S))


def take_part(worker: Worker, runs: QuerySet[Run]) -> Part | None:
    """A part in one of `runs` that was granted to the worker and that it has not taken yet, with a new token."""
    granted = Node.objects.filter(worker=worker, run__in=runs, attempt__gt=0, attempt=F("run__attempt"), run__state__in=LIVE)
    node = granted.filter(token_sha256="", outcome="").order_by("pk").first()
    if node is None:
        return None
    run, token = locked(node.run_id), secret.make("mlr_")
    untaken = Node.objects.filter(pk=node.pk, token_sha256="", outcome="")
    taken = {"token_sha256": secret.digest(token), "lease_until": after_now(LEASE_S)}
    if run.attempt != node.attempt or run.state not in LIVE or not untaken.update(**taken):
        return None
    if node.rank == 0:
        digests = [*run.attempt_token_sha256s[:-1], secret.digest(token)]
        Run.objects.filter(pk=run.pk).update(attempt_token_sha256s=digests, lease_until=after_now(LEASE_S))
    node.run = run
    return Part(node, token)
