"""Who speaks under a worker's name: the user whose token said it first, until an administrator releases it.

The worker's `token` is the one with which it spoke last. A new token of the same user takes over, if it reaches as far: one that is bound to
a project takes no worker from one that is not. A revoked token keeps its name: the runs whose checkpoints that host holds are not another's.
"""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.db.models.functions import Now

from experiments.access import Principal
from experiments.models import Worker


class HeldByAnother(Exception):  # noqa: N818  an answer, not an error
    """The name is another's; the message says whose, and what to do."""


@transaction.atomic
def greet(principal: Principal, *, name: str, **facts: Any) -> Worker:
    """The worker of that name, new or as it is now. Raises HeldByAnother."""
    heard = {**facts, "last_seen": Now(), "token_id": principal.token_id}
    worker, _ = Worker.objects.get_or_create(name=name, defaults=heard)
    return _heard(principal, worker.pk, **heard)


@transaction.atomic
def hear(principal: Principal, worker_id: int) -> Worker:
    """The worker of that number, which says that it is there. Raises HeldByAnother, Worker.DoesNotExist."""
    return _heard(principal, worker_id, last_seen=Now(), token_id=principal.token_id)


def _heard(principal: Principal, worker_id: int, **facts: Any) -> Worker:
    worker = Worker.objects.select_for_update(of=("self",)).select_related("token__user", "token__project").get(pk=worker_id)
    _check_holder(worker, principal)
    Worker.objects.filter(pk=worker_id).update(**facts)
    return Worker.objects.get(pk=worker_id)


def _check_holder(worker: Worker, principal: Principal) -> None:
    held = worker.token
    if held is None or (held.user_id == principal.user.pk and principal.project_id in (None, held.project_id)):
        return
    holder = held.user.get_username()
    whose, instead = holder, f"a token of {holder}"
    if held.user_id == principal.user.pk:  # projects and tokens are not told to others
        project = f" for project {held.project.name}" if held.project else ""
        whose += f" (token {held.prefix}…{project})"
        instead += project or " that is bound to no project"
    raise HeldByAnother(
        f"the worker {worker.name} is held by {whose}. Give this one another name (MOELAB_WORKER_NAME), use {instead},"
        " or have an administrator release the name on the page Workers"
    )


def release(worker_id: int) -> bool:
    """Whoever says the worker's name next holds it; False if there is no such worker. Until then it is handed no run."""
    return bool(Worker.objects.filter(pk=worker_id).update(token=None))
