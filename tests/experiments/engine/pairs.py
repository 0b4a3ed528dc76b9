"""Runs on two hosts, and workers that ask for them."""

from __future__ import annotations

from typing import Any

from experiments.actions.claim import Claim, claim
from experiments.actions.gather import PATIENCE_S
from experiments.actions.now import after_now
from experiments.models import Node, Run, Transition, Worker
from tests.experiments.engine import people

PAIR = {"data": 2, "nodes": 2}


def ask(worker: Worker, devices: list[str] | None = None) -> Claim | None:
    return claim(Run.objects.all(), worker=worker, free_slots=worker.slots, free_devices=["cpu:0"] if devices is None else devices)


def pair(**fields: Any) -> Run:
    return people.queued(parallel=PAIR, **fields)


def state(run: Run) -> str:
    return Run.objects.get(pk=run.pk).state


def places_are_over() -> None:
    Node.objects.filter(attempt=0).update(lease_until=after_now(-1))


def has_waited(run: Run) -> None:
    Transition.objects.filter(run=run).update(at=after_now(-PATIENCE_S - 1))


def granted(*workers: Worker) -> tuple[Run, list[Claim]]:
    """A pair's run on the workers, in the order of their asking, and what each of them got."""
    run = pair()
    first, second = workers
    assert ask(first) is None
    last = ask(second)
    earlier = ask(first)
    assert earlier and last
    return run, [earlier, last]
