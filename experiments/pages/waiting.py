"""What a queued run waits for, in words: a worker at all, one that is large enough, one that has its checkpoint, or one that is free."""

from __future__ import annotations

from experiments.actions.books import WORKER_SILENT_S, Books, n_cuda_of
from experiments.actions.now import after_now
from experiments.actions.source import bringers, with_source
from experiments.models import Run, State, Worker

_NAMED = 3


def waits_for(run: Run) -> str:
    """For the run's page; empty for a run that is not queued."""
    if run.state != State.QUEUED or run.recorded:
        return ""
    alive = list(Worker.objects.filter(last_seen__gt=after_now(-WORKER_SILENT_S)))
    if not alive:
        return "No worker is connected: the run waits until one is. `moelab worker` starts one on any host."
    share, most = run.world_size // run.node_count, max(map(n_cuda_of, alive))
    if run.device == "cuda" and share > most:
        return f"The run takes {share} CUDA device{'s' * (share > 1)} on a host, and no worker that is connected has more than {most}."
    able = bringers(with_source(Run.objects.filter(pk=run.pk)).get(), Books.read().possible(run))
    if able and len(able) < len(alive):
        names = [worker.name for worker in able[:_NAMED]] + [f"{len(able) - _NAMED} more"] * (len(able) > _NAMED)
        which = "the worker that has" if len(able) == 1 else "one of those that have"
        return f"Waiting for free devices on {', '.join(names)}: {which} the checkpoint that the run goes on from."
    return "Waiting for a worker with free devices."
