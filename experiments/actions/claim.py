"""Hands a queued run to a worker: exactly one claim gets it, with an attempt number that fences every later write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.db.models import BigIntegerField, F, Q, QuerySet
from django.db.models.fields.json import KT
from django.db.models.functions import Cast, Coalesce

from experiments import secret
from experiments.actions.now import after_now
from experiments.actions.transition import transition
from experiments.models import LIVE, Run, State, Worker

LEASE_S = 15
HEARTBEAT_S = 3
WORKER_SILENT_S = 60
"""A worker that has not been heard for so long counts as away."""


@dataclass(frozen=True)
class Claim:
    """A run of one worker, and the token of its attempt, which is nowhere else in the clear."""

    run: Run
    token: str
    devices: list[str]


@transaction.atomic
def claim(runs: QuerySet[Run], *, worker: Worker, free_slots: int, free_devices: Sequence[str]) -> Claim | None:
    """The most urgent, then oldest of `runs` that fits the worker's free devices; None if none does.

    The server's own books count too: two claims of one worker at the same moment do not get one device twice.
    """
    Worker.objects.select_for_update().get(pk=worker.pk)
    busy = list(Run.objects.filter(worker=worker, state__in=LIVE).values_list("devices", flat=True))
    if min(free_slots, worker.slots - len(busy)) < 1:
        return None
    taken = {device for devices in busy for device in devices}
    cuda = [device for device in dict.fromkeys(free_devices) if device.startswith("cuda:") and device not in taken]
    cpu = next((device for device in free_devices if device.startswith("cpu")), None)
    n_cuda = sum(device.get("kind") == "cuda" for device in worker.devices)
    run = (
        runs.filter(state=State.QUEUED, recorded=False)
        .annotate(begins_with=Coalesce(Cast(KT("spec__start__run"), BigIntegerField()), 0))
        .filter(_fits(len(cuda), n_cuda, cpu is not None))
        .exclude(_waits_for_another_host(worker))
        .select_for_update(skip_locked=True, of=("self",))
        .order_by("-priority", "created_at", "id")
        .first()
    )
    if run is None:
        return None
    on_cuda = run.device == "cuda" or (run.device == "auto" and n_cuda >= run.world_size)
    devices = cuda[: run.world_size] if on_cuda else [cpu or "cpu:0"] * run.world_size
    token = secret.make("mlr_")
    transition(
        run,
        State.STARTING,
        by=f"worker:{worker.name}",
        **_new_attempt(run, token, worker, devices),
    )
    return Claim(run, token, devices)


def _fits(free_cuda: int, n_cuda: int, has_cpu: bool) -> Q:
    """Runs that the free devices can take. `auto` takes CUDA on a worker that has enough of it, and waits for it there."""
    fits = Q(device__in=["cuda", "auto"], world_size__lte=free_cuda)
    if has_cpu:
        fits |= Q(device="cpu") | Q(device="auto", world_size__gt=n_cuda)
    return fits


def _waits_for_another_host(worker: Worker) -> Q:
    """Runs whose checkpoints, their own or the one they begin with, lie on another host that is alive: there they can be read."""
    alive = after_now(-WORKER_SILENT_S)
    others = list(Worker.objects.filter(last_seen__gt=alive).exclude(host=worker.host).values_list("host", flat=True).distinct())
    own = Q(progress_checkpoint_step__gt=0, worker__last_seen__gt=alive) & ~Q(worker__host=worker.host)
    resumed = Q(resume_from__isnull=False, resume_from__host__in=others)
    begun = Q(begins_with__in=Run.objects.filter(worker__host__in=others).values("pk"))
    return own | (Q(progress_checkpoint_step=0) & (resumed | begun))


def _new_attempt(run: Run, token: str, worker: Worker, devices: list[str]) -> dict[str, Any]:
    return {
        "attempt": F("attempt") + 1,
        "attempt_token_sha256s": [*run.attempt_token_sha256s, secret.digest(token)],
        "lease_until": after_now(LEASE_S),
        "worker": worker,
        "devices": devices,
        "checkpoint_requests": 0,
        "exit_code": None,
        "signal": None,
    }
