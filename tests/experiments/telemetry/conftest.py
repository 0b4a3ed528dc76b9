"""Runs to send telemetry to, and the frames that a supervisor would send."""

from __future__ import annotations

import secrets as random_secrets
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from asgiref.sync import SyncToAsync
from django.contrib.auth.models import User
from django.db import connections

from experiments import secret
from experiments.models import Membership, Project, Role, Run, Token
from spec import events

L, E, NAMES = 2, 3, ["loss", "lr"]


@pytest.fixture(autouse=True)
def _no_left_connections(transactional_db: None) -> Iterator[None]:
    """The tests' threads give their connections back, so that the database can be emptied."""
    yield
    connections.close_all()
    SyncToAsync.single_thread_executor.submit(connections.close_all).result()


@pytest.fixture
def project() -> Project:
    return Project.objects.create(name=f"p{random_secrets.token_hex(4)}")


def person(name: str, project: Project | None = None, role: str = Role.EDITOR) -> User:
    user = User.objects.create_user(name, password="a long enough one")
    if project is not None:
        Membership.objects.create(project=project, user=user, role=role)
    return user


def token_of(user: User, *scopes: str) -> str:
    value = "mlk_" + random_secrets.token_urlsafe(24)
    Token.objects.create(user=user, name="t", prefix=value[:8], sha256=secret.digest(value), scopes=list(scopes))
    return value


@pytest.fixture
def owner(project: Project) -> User:
    return person("owner", project)


@pytest.fixture
def make_run(project: Project, owner: User) -> Callable[..., Run]:
    def make(**fields: Any) -> Run:
        defaults = {"name": "r", "state": "running", "attempt": 1, "attempt_token_sha256s": [secret.digest("run-token")]}
        return Run.objects.create(project=project, owner=owner, **{**defaults, **fields})

    return make


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    return make_run()


def started(attempt: int = 1, resumed: int | None = None) -> events.RunStarted:
    return events.RunStarted(attempt=attempt, at=1.7e9, resumed_from_step=resumed, moe_layers=list(range(L)), n_experts=E, top_k=1, steps=1000)


def declared(names: Sequence[str] = NAMES) -> events.MetricsDeclared:
    return events.MetricsDeclared(names=list(names))


def step(number: int, *, salt: int = 0, width: int = len(NAMES), tensors: bool = True) -> events.StepDone:
    """A step whose numbers depend on nothing but its own and `salt`."""
    rng = np.random.default_rng([number, salt])
    scalars = rng.normal(size=width).astype(np.float32)
    if number % 7 == 0:
        scalars[0] = np.nan
    arrays = {"expert_tokens": rng.integers(0, 2 ** (8 + number % 20), (L, E)).astype(np.uint32), "router_prob": rng.random((L, E), np.float32)}
    return events.StepDone(step=number, at=1.7e9 + number, scalars=scalars, tensors=arrays if tensors else {})


def payloads(said: Sequence[events.Event]) -> list[memoryview]:
    return [memoryview(events.encode(event)) for event in said]


def events_frame(attempt: int, said: Sequence[events.Event]) -> bytes:
    records = [struct.pack("<II", len(data), zlib.crc32(data)) + data for data in payloads(said)]
    return b"E" + struct.pack("<I", attempt) + b"".join(records)
