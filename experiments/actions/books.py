"""What the server's books say of workers: which of their devices are taken, and what they may and could take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from django.db.models import F, Q
from django.db.models.functions import Now

from experiments.access import projects_of_workers
from experiments.actions.now import after_now
from experiments.models import LIVE, Node, Run, Worker

WORKER_SILENT_S = 60
"""A worker that has not been heard for so long counts as away."""


@dataclass(frozen=True)
class Books:
    """The workers that are alive; the devices of each run, part of a run and kept place that holds one of their slots; and for each
    token of theirs the projects whose runs it lets them take."""

    workers: list[Worker]
    taken: Mapping[int, list[list[str]]]
    projects: Mapping[int, frozenset[int]]

    @classmethod
    def read(cls) -> Books:
        """As they are now."""
        alive = list(Worker.objects.filter(last_seen__gt=after_now(-WORKER_SILENT_S)).order_by("pk"))
        tokens = {worker.token_id for worker in alive if worker.token_id is not None}
        return cls(alive, _taken([worker.pk for worker in alive], Q(lease_until__gt=Now())), projects_of_workers(tokens))

    def possible(self, run: Run) -> list[Worker]:
        """The workers that may have the run and could, once they are free, take a host's share of it."""
        return [worker for worker in self.workers if self.could_take(worker, run, kind_for(run, n_cuda_of(worker)), now=False)]

    def could_take(self, worker: Worker, run: Run, kind: str, *, now: bool) -> bool:
        """Whether the worker may have the run, and has a slot and devices of that kind for a host's share of it; `now`: whether they are free."""
        if worker.token_id is None or run.project_id not in self.projects.get(worker.token_id, ()):
            return False
        share, n_cuda = run.world_size // run.node_count, n_cuda_of(worker)
        if kind_for(run, n_cuda) != kind or worker.slots < 1:
            return False
        busy = self.taken.get(worker.pk, []) if now else []
        taken = {device for devices in busy for device in devices if device.startswith("cuda")}
        room = n_cuda - len(taken) >= share if kind == "cuda" else any(device.get("kind") == "cpu" for device in worker.devices)
        return room and len(busy) < worker.slots


def taken_by(worker: Worker) -> list[list[str]]:
    """The devices of each run, part of a run and place that holds a slot of the worker; a place does until somebody lets go of it."""
    return _taken([worker.pk], Q()).get(worker.pk, [])


def _taken(workers: list[int], kept: Q) -> dict[int, list[list[str]]]:
    alone = Run.objects.filter(worker__in=workers, state__in=LIVE, node_count=1, lease_until__isnull=False)  # which has an index
    parts = Node.objects.filter(worker__in=workers).filter((Q(attempt=0) & kept) | Q(attempt__gt=0, attempt=F("run__attempt"), run__state__in=LIVE))
    found: defaultdict[int, list[list[str]]] = defaultdict(list)
    for rows in (alone, parts):
        for worker, devices in rows.values_list("worker_id", "devices"):
            found[worker].append(devices)
    return dict(found)


def n_cuda_of(worker: Worker) -> int:
    """How many CUDA devices it has, free or not."""
    return sum(device.get("kind") == "cuda" for device in worker.devices)


def kind_for(run: Run, n_cuda: int) -> str:
    """`cuda` or `cpu`: what the run's ranks take on a worker with `n_cuda` CUDA devices."""
    return "cuda" if run.device == "cuda" or (run.device == "auto" and n_cuda >= run.world_size // run.node_count) else "cpu"
