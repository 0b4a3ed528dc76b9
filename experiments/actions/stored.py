"""Checkpoints in a storage that hosts share: what its keepers say of it, where a checkpoint can be had, and what a claim hands out of it.

A host's word on the storage counts for the run whose attempt it speaks for. That a checkpoint is stored says nothing of the disk of the host
that saved it: it may be in both places, and is preferred where it is on the worker's disk.
"""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.db.models import Q, QuerySet
from pydantic import BaseModel, ConfigDict, Field

from experiments.access import projects_of_workers
from experiments.actions.transition import locked
from experiments.live.publish import publish_run
from experiments.models import Checkpoint, Run, Worker
from experiments.models.telemetry import SpoolCursor
from spec import storage
from spec.events import Step
from spec.storage import Place, StorageURL
from spec.text import Storable

MAX_DETAIL = 500
_MAX_CHECKPOINTS = 2000


class _Word(BaseModel):
    model_config = ConfigDict(extra="ignore")

    storage: StorageURL = Field(min_length=1)


class _One(BaseModel):
    model_config = ConfigDict(extra="ignore")

    attempt: int = Field(ge=1, lt=2**31)
    step: Step
    sha256: str = Field(max_length=64)


class _Problem(BaseModel):
    model_config = ConfigDict(extra="ignore")

    step: Step
    detail: Storable = Field(max_length=4000)


class InStorage(_Word):
    """All that a storage has of the run, and why the newest checkpoint is not there."""

    checkpoints: list[_One] = Field(max_length=_MAX_CHECKPOINTS)
    problem: _Problem | None = None


class Damaged(_Word):
    """A checkpoint, of the run or of the one that it begins from, that is not in the storage as it was put there."""

    place: Place
    detail: Storable = Field(max_length=4000)


# ----- what is said


@transaction.atomic
def record_stored(run_id: int, attempt: int, told: InStorage) -> None:
    """Writes down what is where. Checkpoints that the server has not heard of are left out: say it again later. So are those of a past
    that the run has left. Ignores a fenced attempt.
    """
    run = locked(run_id)
    if run.attempt != attempt:
        return
    mine = Checkpoint.objects.filter(run=run_id)
    there = {(one.attempt, one.step): one.sha256 for one in told.checkpoints}
    changed = 0
    for row in mine.filter(Q(storage=told.storage) | Q(step__in={step for _, step in there})):
        stored = told.storage if there.get((row.attempt, row.step)) == row.sha256 else ""
        if stored != row.storage and (not is_left_behind(run_id, row.attempt, row.step) if stored else row.storage == told.storage):
            changed += mine.filter(pk=row.pk).update(storage=stored, storage_problem="")
    why = (told.problem.step, told.problem.detail[:MAX_DETAIL]) if told.problem else (-1, "")
    changed += mine.exclude(storage_problem="").exclude(attempt=attempt, step=why[0]).update(storage_problem="")
    changed += mine.filter(attempt=attempt, step=why[0], storage="").exclude(storage_problem=why[1]).update(storage_problem=why[1])
    if changed:
        publish_run(run_id)


@transaction.atomic
def record_damaged(run_id: int, attempt: int, told: Damaged) -> None:
    """That checkpoint is not offered from the storage any more. Ignores a fenced attempt, and places of runs that this one has nothing to do with.

    Of the run that it begins from the word counts if the worker that says it could have that run as well: who may only view a run changes nothing
    about it.
    """
    run = locked(run_id)
    if run.attempt != attempt:
        return
    origin, token = origin_of(run), run.worker.token_id if run.worker else None
    projects = projects_of_workers([token] if token else []).get(token or 0, frozenset())
    those = Q(run=run_id) | Q(run=origin[0] if origin else None, run__project__in=projects)
    for row in Checkpoint.objects.filter(those, storage=told.storage).select_related("run"):
        if place(row) == told.place:
            Checkpoint.objects.filter(pk=row.pk).update(storage="", storage_problem=told.detail[:MAX_DETAIL])
            publish_run(row.run_id)


# ----- where it is


def folder(run: Run) -> str:
    """The run's folder in any storage."""
    return storage.folder(run.pk, run.created_at)


def place(row: Checkpoint) -> str:
    """Where in a storage a checkpoint lies if it is there; its run should have been selected with it."""
    return storage.place(folder(row.run), row.attempt, row.step)


def stored_at(row: Checkpoint) -> str:
    """The URL of its copy; "" where there is none."""
    return f"{row.storage}/{place(row)}" if row.storage else ""


def place_for(row: Checkpoint, worker: Worker) -> str | None:
    """The place from which this worker can fetch it."""
    return place(row) if row.storage and row.storage == worker.storage else None


def counting(run_id: int) -> QuerySet[Checkpoint]:
    """The run's checkpoints that are on some disk or in a storage, the newest first."""
    return Checkpoint.objects.filter(run=run_id).filter(Q(deleted=False) | ~Q(storage="")).select_related("run").order_by("-attempt", "-step")


def origin_of(run: Run) -> tuple[int, int] | None:
    """(run, step) of the checkpoint that the run begins from; None where it begins from none of a run's."""
    named = run.resume_from or run.spec.get("start") or {}
    if not isinstance(named.get("run"), int) or not isinstance(named.get("step"), int):
        return None
    return named["run"], named["step"]


def saved_at(run_id: int, step: int) -> Checkpoint | None:
    """The checkpoint of a step; of several the last attempt's."""
    return counting(run_id).filter(step=step).first()


def handed_out(run: Run, worker: Worker) -> dict[str, Any]:
    """What a claim says of the checkpoints that the worker may need."""
    rows = counting(run.pk)[:_MAX_CHECKPOINTS]
    trained = SpoolCursor.objects.filter(run=run.pk, started=True).order_by("-attempt").values_list("attempt", flat=True).first()
    origin = origin_of(run)
    start: dict[str, Any] | None = {"run": origin[0], "step": origin[1]} if origin else None
    if start and origin and (row := saved_at(*origin)) is not None:
        start |= {"sha256": row.sha256, "place": place_for(row, worker)}
    return {
        "stored_as": folder(run),
        "trained": trained or 0,
        "checkpoints": [{"attempt": row.attempt, "step": row.step, "sha256": row.sha256, "place": place_for(row, worker)} for row in rows],
        "resume_from": run.resume_from and {**run.resume_from, **(start or {})},
        "start": None if run.resume_from else start,
    }


# ----- when attempts leave checkpoints behind


def leave_behind(run_id: int, attempt: int, resumed_from_step: int | None) -> None:
    """An attempt has gone on from that step: what older ones saved after it is of a past that the run has left."""
    after = -1 if resumed_from_step is None else resumed_from_step
    older = Checkpoint.objects.filter(run=run_id, attempt__lt=attempt, step__gt=after)
    older.filter(Q(deleted=False) | ~Q(storage="")).update(deleted=True, storage="", storage_problem="")


def is_left_behind(run_id: int, attempt: int, step: int) -> bool:
    """Whether a later attempt has gone on from before that step."""
    later = SpoolCursor.objects.filter(run=run_id, attempt__gt=attempt, started=True)
    return later.filter(Q(resumed_from_step=None) | Q(resumed_from_step__lt=step)).exists()
