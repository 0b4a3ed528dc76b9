"""Gathers the hosts of a run that wants several. Each worker that asks keeps a place, with its devices, for at most GATHER_S; the one
that completes the run grants it to all of them in one transaction. A gathering that stays incomplete lets go of all its places at
once, so that two half-gathered runs never wait for each other: whoever asks then begins again with the most urgent, oldest run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from django.db.models import Exists, F, OuterRef, Q, QuerySet
from django.db.models.functions import Now

from experiments import secret
from experiments.actions.books import Books, kind_for, n_cuda_of
from experiments.actions.lease import LEASE_S, begin_attempt
from experiments.actions.now import after_now
from experiments.actions.queue import waiting
from experiments.actions.source import bringable, bringers
from experiments.actions.transition import locked
from experiments.doorbell import ring_workers_after_commit
from experiments.models import LIVE, Node, Run, State, Transition, Worker

GATHER_S = 12
PATIENCE_S = 300
"""A run that has been queued for so long is gathered although some hosts are busy: those that are free keep their devices for it."""
KIND = ("project_id", "device", "world_size", "node_count")
"""What decides who could be a host of a run, but for where its checkpoint lies."""


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
    granted = Q(attempt__gt=0, attempt=F("run__attempt"), run__state__in=LIVE, token_sha256="", outcome="")
    return Node.objects.filter(Q(attempt=0) | granted, worker=worker).count()


def joinable(fitting: QuerySet[Run], worker: Worker) -> QuerySet[Run]:
    """Those of `fitting` on several hosts that are being gathered, or for which enough others can be had, and in which the worker has no place.

    Whether enough can be had depends on little that differs: the books are asked once for each such kind of run.
    """
    wide, places = fitting.filter(node_count__gt=1), Node.objects.filter(run=OuterRef("pk"), attempt=0)
    kept = places.filter(lease_until__gte=Now())
    books: Books | None = None
    those = Q(pk__in=[])
    for facts in wide.order_by().values(*KIND).distinct():
        books, run = books or Books.read(), Run(**facts)
        kind = kind_for(run, n_cuda_of(worker))
        enough = Q(pk__in=[])
        for recent in (True, False):
            others = [other for other in books.workers if other != worker and books.could_take(other, run, kind, now=recent)]
            if len(others) >= run.node_count - 1:
                near = bringable([worker, *others], books.possible(run))
                enough |= near if recent else near & ~Q(Exists(_recent(OuterRef("pk"))))
        begun = Q(Exists(kept.filter(devices__0__startswith=kind)))
        those |= Q(**facts) & (begun | (~Q(Exists(kept)) & enough))
    return wide.filter(those).exclude(Exists(places.filter(worker=worker)))


def locked_while_waiting(wide: Run) -> Run | None:
    """The run, its row locked, which is waited for: another claim that has it may be gathering it. None if it waits no more."""
    return waiting(Run.objects.filter(pk=wide.pk)).select_for_update(of=("self",)).first()


def join(run: Run, worker: Worker, devices: Sequence[str]) -> None:
    """Keeps a place in `run`, which the caller has locked, unless its other hosts cannot be had; the last one grants the run to all."""
    places = Node.objects.filter(run=run, attempt=0)
    over = places.select_for_update(skip_locked=True, of=("self",)).filter(lease_until__lt=Now())  # one that is locked its own worker gives up
    Node.objects.filter(pk__in=[node.pk for node in over]).delete()
    kept = list(places.select_for_update(of=("self",)).filter(lease_until__gte=Now()).select_related("worker").order_by("pk"))
    kind = _kind(devices)
    if any(node.worker_id == worker.pk or _kind(node.devices) != kind for node in kept):
        return
    here, books = [*(node.worker for node in kept), worker], Books.read()
    others = _others(run, kind, here, books)
    first = bringers(run, books.possible(run))  # one of them becomes node 0
    begins_here = not first or any(member in first for member in here)
    lacking = run.node_count - len(here)
    if lacking > len(others) or (not begins_here and (not lacking or not any(other in first for other in others))):
        return
    until = kept[0].lease_until if kept else after_now(GATHER_S)
    kept.append(Node.objects.create(run=run, worker=worker, devices=list(devices), lease_until=until))
    if lacking:
        ring_workers_after_commit(others)
    else:
        at_home = run.home  # type: ignore[attr-defined]
        _grant(run, sorted(kept, key=lambda node: (node.worker.host != at_home, node.worker not in first, node.worker_id != run.worker_id)))
        ring_workers_after_commit(here[:-1])


def _kind(devices: Sequence[str]) -> str:
    return devices[0].partition(":")[0]


def _others(run: Run, kind: str, without: Sequence[Worker], books: Books) -> list[Worker]:
    """Workers that are alive and could be hosts of the run: now or, where it has been queued for long, once they are free."""
    recent = _recent(run.pk).exists()
    return [worker for worker in books.workers if worker not in without and books.could_take(worker, run, kind, now=recent)]


def _recent(run_id: int | OuterRef) -> QuerySet[Transition]:
    """What queued the run within PATIENCE_S."""
    return Transition.objects.filter(run=run_id, to_state=State.QUEUED, at__gt=after_now(-PATIENCE_S))


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
