"""What viewers are told from the store, read once for all who ask for the same at the same time."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from experiments.api.resources import run_json
from experiments.models import Run
from experiments.models.telemetry import Event
from experiments.telemetry import read, rollup, write
from experiments.telemetry.read import Facts
from experiments.threads import Threads

T = TypeVar("T")
FILL_STEPS = 500
"""More missing steps than this are not pushed: the viewer is told to fetch them at the zoom it needs."""
FILL_CELLS = 1_000_000
FILL_EVENTS = 200

threads = Threads("live", 8)
_shared: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[Any, ...], asyncio.Task[Any]]] = weakref.WeakKeyDictionary()


async def shared(key: tuple[Any, ...], function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` in a thread. Who asks with the same key before the thread begins gets the same answer: never an older one."""
    loop = asyncio.get_running_loop()
    asked = _shared.setdefault(loop, {})

    def begin() -> T:
        asked.pop(key, None)
        return function(*args)

    task = asked.get(key)
    if task is None:
        task = asked[key] = loop.create_task(threads.run(begin))
        task.add_done_callback(lambda done: asked.pop(key) if asked.get(key) is done else None)  # A thread that could not even begin.
    answer: T = await asyncio.shield(task)
    return answer


@dataclass(frozen=True)
class Missed:
    """What a viewer at (step, event) has not seen: steps as a block, or only the fact that there are too many of them.

    `void_after`: what it has of later steps has been archived meanwhile.
    """

    last: int
    void_after: int | None
    last_event: int
    block: bytes | None
    too_many: bool
    events: list[dict[str, Any]]


def position(run_id: int) -> tuple[int, int]:
    """The run's last step and the id of its last event."""
    facts = Facts.fetch(run_id)
    newest = Event.objects.filter(run_id=run_id).order_by("-id").values_list("id", flat=True).first()
    return facts.last, newest or 0


def missed(run_id: int, after: int, after_event: int) -> Missed:
    """What has come after that step and that event.

    After a new attempt all later steps are void, also where it went on from beyond `after`: who was told to fetch may have fetched further.
    """
    # Before the facts: an attempt that starts in between is told of again next time.
    events = list(Event.objects.filter(run_id=run_id, id__gt=after_event).order_by("id")[:FILL_EVENTS])
    facts = Facts.fetch(run_id)
    last_event = events[-1].pk if events else after_event
    started = [event.body for event in events if event.kind == "run_started" and event.body.get("attempt", 1) > 1]
    void_after = min([facts.last, after, *(body.get("resumed_from_step") or 0 for body in started)])
    block, too_many = None, False
    if void_after < after or started:
        return Missed(facts.last, void_after, last_event, None, True, [write.as_json(event) for event in events])
    if facts.last > after:
        kinds = rollup.kinds(run_id)
        n_steps = facts.last - after
        too_many = n_steps > FILL_STEPS or n_steps * read.cells(facts, kinds, 1, after + 1, facts.last) > FILL_CELLS
        if not too_many:
            block = read.steps_block(facts, after + 1, facts.last, kinds=kinds)
    return Missed(facts.last, None, last_event, block, too_many, [write.as_json(event) for event in events])


def run_of(run_id: int) -> tuple[int, str] | None:
    """The run's project and the run as REST shows it, as JSON; None where it is gone."""
    run = Run.objects.select_related("project", "owner", "worker").filter(pk=run_id).first()
    return None if run is None else (run.project_id, json.dumps(run_json(run), allow_nan=False))
