"""The queue as a worker sees it: the runs of which it has room for a host's share, the most urgent and then the oldest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.db.models import F, Q, QuerySet

from experiments.actions.books import kind_for, n_cuda_of, taken_by
from experiments.actions.source import with_source
from experiments.models import Run, State, Worker


@dataclass(frozen=True)
class Room:
    """What a worker has free for the next run: CUDA devices, and a CPU if it offers one."""

    cuda: list[str]
    cpu: str | None
    n_cuda: int
    """How many CUDA devices the worker has, free or not."""

    @classmethod
    def of(cls, worker: Worker, free_slots: int, free_devices: Sequence[str], kept: int) -> Room | None:
        """By what the worker says and by the server's books; None without a slot, of which `kept` are promised to runs that it does not know yet."""
        busy = taken_by(worker)
        if min(free_slots - kept, worker.slots - len(busy)) < 1:
            return None
        taken = {device for devices in busy for device in devices}
        cuda = [device for device in dict.fromkeys(free_devices) if device.startswith("cuda:") and device not in taken]
        return cls(cuda, next((device for device in free_devices if device.startswith("cpu")), None), n_cuda_of(worker))

    def devices_for(self, run: Run) -> list[str]:
        """What the run's ranks on this host would get."""
        share = run.world_size // run.node_count
        return self.cuda[:share] if kind_for(run, self.n_cuda) == "cuda" else [self.cpu or "cpu:0"] * share

    @property
    def fits(self) -> Q:
        """Runs of which it can take a host's `share`. `auto` takes CUDA on a worker that has enough of it, and waits for it there."""
        fits = Q(device__in=["cuda", "auto"], share__lte=len(self.cuda))
        if self.cpu is not None:
            fits |= Q(device="cpu") | Q(device="auto", share__gt=self.n_cuda)
        return fits


def waiting(runs: QuerySet[Run]) -> QuerySet[Run]:
    """Those of `runs` that nobody has, in order, each with a host's `share` of its ranks and where what it goes on from can be had (see source)."""
    queued = runs.filter(state=State.QUEUED, recorded=False).annotate(share=F("world_size") / F("node_count"))
    return with_source(queued).order_by("-priority", "created_at", "id")


def before(run: Run) -> Q:
    """The runs that come before `run` in the order of the queue."""
    sooner = Q(created_at__lt=run.created_at) | Q(created_at=run.created_at, pk__lt=run.pk)
    return Q(priority__gt=run.priority) | (Q(priority=run.priority) & sooner)
