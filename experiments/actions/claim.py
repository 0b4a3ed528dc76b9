"""Hands a queued run to a worker: exactly one claim gets it, with an attempt number that fences every later write.

A run on several hosts is handed to all of them at once (see gather).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.db import transaction
from django.db.models import BigIntegerField, F, Q, QuerySet
from django.db.models.fields.json import KT
from django.db.models.functions import Cast, Coalesce

from experiments import secret
from experiments.actions import gather
from experiments.actions.books import WORKER_SILENT_S, Books, kind_for, n_cuda_of, taken_by
from experiments.actions.lease import begin_attempt
from experiments.actions.now import after_now
from experiments.models import Run, State, Worker

LOOKS = 20
"""Runs on several hosts that one ask looks at."""


@dataclass(frozen=True)
class Claim:
    """A run of one worker, or `node` of one on several hosts, and the token of its attempt, which is nowhere else in the clear."""

    run: Run
    token: str
    devices: list[str]
    node: int = 0


@transaction.atomic
def claim(runs: QuerySet[Run], *, worker: Worker, free_slots: int, free_devices: Sequence[str]) -> Claim | None:
    """The most urgent, then oldest of `runs` that fits the worker's free devices; None if none does.

    The server's own books count too: two claims of one worker at the same moment do not get one device twice. Where the run wants
    several hosts, the worker keeps a place in it, and its claim comes with a later ask, once the others have one too.
    """
    Worker.objects.select_for_update(no_key=True).get(pk=worker.pk)
    gather.let_go(worker)
    passed: set[int] = set()
    books: Books | None = None
    while True:
        if (part := gather.take_part(worker, runs)) is not None:
            return Claim(part.node.run, part.token, part.node.devices, part.node.rank)
        left = runs.exclude(pk__in=passed) if len(passed) < LOOKS else runs.filter(node_count=1)
        run, devices = _next(left, worker, free_slots, free_devices)
        if run is None:
            return None
        if run.node_count == 1:
            token = secret.make("mlr_")
            begin_attempt(run, worker, devices, secret.digest(token))
            return Claim(run, token, devices)
        passed.add(run.pk)
        books = books or Books.read()
        gather.join(run, worker, devices, books)


def _next(runs: QuerySet[Run], worker: Worker, free_slots: int, free_devices: Sequence[str]) -> tuple[Run | None, list[str]]:
    """The first run that the worker has room for, its row locked, and the devices that its ranks here would get."""
    busy = taken_by(worker)
    if min(free_slots - gather.places_of(worker), worker.slots - len(busy)) < 1:
        return None, []
    taken = {device for devices in busy for device in devices}
    cuda = [device for device in dict.fromkeys(free_devices) if device.startswith("cuda:") and device not in taken]
    cpu = next((device for device in free_devices if device.startswith("cpu")), None)
    n_cuda = n_cuda_of(worker)
    alive = Worker.objects.filter(last_seen__gt=after_now(-WORKER_SILENT_S)).count()
    run = (
        runs.filter(state=State.QUEUED, recorded=False, node_count__lte=max(1, alive))
        .annotate(begins_with=Coalesce(Cast(KT("spec__start__run"), BigIntegerField()), 0), share=F("world_size") / F("node_count"))
        .filter(_fits(len(cuda), n_cuda, cpu is not None))
        .exclude(_waits_for_another_host(worker))
        .select_for_update(skip_locked=True, of=("self",))
        .order_by("-priority", "created_at", "id")
        .first()
    )
    if run is None:
        return None, []
    share = run.world_size // run.node_count
    return run, cuda[:share] if kind_for(run, n_cuda) == "cuda" else [cpu or "cpu:0"] * share


def _fits(free_cuda: int, n_cuda: int, has_cpu: bool) -> Q:
    """Runs of which the free devices can take a host's share. `auto` takes CUDA on a worker that has enough of it, and waits for it there."""
    fits = Q(device__in=["cuda", "auto"], share__lte=free_cuda)
    if has_cpu:
        fits |= Q(device="cpu") | Q(device="auto", share__gt=n_cuda)
    return fits


def _waits_for_another_host(worker: Worker) -> Q:
    """Runs of one host whose checkpoints, their own or the one they begin with, lie on another that is alive: there they can be read."""
    alive = after_now(-WORKER_SILENT_S)
    others = list(Worker.objects.filter(last_seen__gt=alive).exclude(host=worker.host).values_list("host", flat=True).distinct())
    own = Q(progress_checkpoint_step__gt=0, worker__last_seen__gt=alive) & ~Q(worker__host=worker.host)
    resumed = Q(resume_from__isnull=False, resume_from__host__in=others)
    begun = Q(begins_with__in=Run.objects.filter(worker__host__in=others).values("pk"))
    return Q(node_count=1) & (own | (Q(progress_checkpoint_step=0) & (resumed | begun)))
