"""Hands a queued run to a worker: exactly one claim gets it, with an attempt number that fences every later write.

A run on several hosts is handed to all of them at once (see gather). A claim has at most one run's row locked at a time, so that it
can wait for one that another claim is joining: claims never wait for each other in a circle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from django.db import transaction
from django.db.models import Q, QuerySet

from experiments import secret
from experiments.actions import gather
from experiments.actions.books import Books
from experiments.actions.lease import begin_attempt
from experiments.actions.queue import Room, before, waiting
from experiments.actions.source import bringable
from experiments.models import HAS_ORIGIN, Run, Worker


@dataclass(frozen=True)
class Claim:
    """A run of one worker, or `node` of one on several hosts, and the token of its attempt, which is nowhere else in the clear."""

    run: Run
    token: str
    devices: list[str]
    node: int = 0


def claim(runs: QuerySet[Run], *, worker: Worker, free_slots: int, free_devices: Sequence[str]) -> Claim | None:
    """The most urgent, then oldest of `runs` that fits the worker's free devices; None if none does.

    The server's own books count too: two claims of one worker at the same moment do not get one device twice. Where the run wants
    several hosts, the worker keeps a place in it, and its claim comes with a later ask, once the others have one too.
    """
    seen: set[int] = set()
    while True:
        with transaction.atomic():
            _lock(worker)
            gather.let_go(worker)
            if (part := gather.take_part(worker, runs)) is not None:
                return Claim(part.node.run, part.token, part.node.devices, part.node.rank)
        with transaction.atomic():
            _lock(worker)
            room = Room.of(worker, free_slots, free_devices, kept=gather.places_of(worker))
            if room is None:
                return None
            fitting = waiting(runs).filter(room.fits)
            wide = gather.joinable(fitting.exclude(pk__in=seen), worker).first()
            if (run := _alone(fitting, worker, wide)) is not None:
                token, devices = secret.make("mlr_"), room.devices_for(run)
                begin_attempt(run, worker, devices, secret.digest(token))
                return Claim(run, token, devices)
            if wide is None:
                return None
            seen.add(wide.pk)
            if (run := gather.locked_while_waiting(wide)) is not None:
                gather.join(run, worker, room.devices_for(run))


def _lock(worker: Worker) -> None:
    Worker.objects.select_for_update(no_key=True).get(pk=worker.pk)


def _alone(fitting: QuerySet[Run], worker: Worker, wide: Run | None) -> Run | None:
    """The first run on one host that comes before `wide`, locked, unless another claim has it at this moment. A run whose checkpoint this worker
    cannot have is left to those that can, while one of them is alive.
    """
    runs = fitting.filter(node_count=1)
    runs = runs.filter(_to_be_had(runs, worker))
    if wide is not None:
        runs = runs.filter(before(wide))
    return runs.select_for_update(skip_locked=True, of=("self",)).first()


def _to_be_had(alone: QuerySet[Run], worker: Worker) -> Q:
    """Those of `alone` whose checkpoint, if they need one, the worker can bring, or nobody that may have the run and is alive.

    The books are asked once, and once for each kind of run that needs one; kinds that wait for the same workers are one term.
    """
    books: Books | None = None
    kinds: defaultdict[tuple[int, ...], Q] = defaultdict(Q)
    known: dict[tuple[int, ...], list[Worker]] = {}
    for facts in alone.filter(HAS_ORIGIN).order_by().values(*gather.KIND).distinct():
        books = books or Books.read()
        able = books.possible(Run(**facts))
        key = tuple(other.pk for other in able)
        kinds[key] |= Q(**facts)
        known[key] = able
    to_be_had = ~HAS_ORIGIN
    for key, those in kinds.items():
        to_be_had |= those & bringable([worker], known[key])
    return to_be_had
