"""Ada edits, Vic views, Adam administers the project; Olga is outside of it; Root owns the machine."""

from __future__ import annotations

from functools import cache
from typing import Any

from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import User
from django.utils import timezone

from experiments.actions.submit import submit
from experiments.actions.token import issue
from experiments.models import Membership, Project, Role, Run, Token, Worker
from spec.experiment import ExperimentSpec

TINY: dict[str, Any] = {
    "model": {
        "d_model": 32,
        "n_layers": 2,
        "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 2},
        "moe": {"n_experts": 4, "top_k": 2, "d_expert": 32},
    },
    "training": {"steps": 20, "batch_size": 2},
}


PASSWORD = "correct horse battery"


@cache
def _hashed() -> str:
    """The slow hash of everybody's password, made once."""
    return make_password(PASSWORD)


def user(name: str, project: Project | None = None, role: str | None = None, **kwargs: Any) -> User:
    """The user of that name, in the project if a role is given."""
    found = User.objects.filter(username=name).first() or User.objects.create(username=name, password=_hashed(), **kwargs)
    if project and role:
        Membership.objects.update_or_create(project=project, user=found, defaults={"role": role})
    return found


def ada() -> User:
    return user("ada", Project.default(), Role.EDITOR)


def queued(priority: int = 0, owner: User | None = None, **spec: Any) -> Run:
    """A queued tiny run in the default project."""
    return submit(user=owner or ada(), project=Project.default(), spec=ExperimentSpec.model_validate({**TINY, **spec}), priority=priority)


def worker(name: str = "w1", slots: int = 1, cuda: int = 0, host: str | None = None, token: Token | None = None) -> Worker:
    """A worker that has just said hello, with Ada's token unless another is given."""
    devices = [{"kind": "cpu", "index": 0, "name": "CPU", "memory_bytes": 1}]
    devices += [{"kind": "cuda", "index": i, "name": "GPU", "memory_bytes": 1} for i in range(cuda)]
    token = token or Token.objects.filter(user=ada(), name="workers").first() or issue(user=ada(), name="workers", scopes=["worker"]).token
    facts = {"pid": 1, "version": "0", "devices": devices, "slots": slots, "last_seen": timezone.now(), "token": token}
    return Worker.objects.create(name=name, host=host or name, **facts)
