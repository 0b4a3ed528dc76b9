"""A worker's name is its holder's: another's token is told so, a new token of the holder takes over, an administrator releases it."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from rest_framework.response import Response
from rest_framework.test import APIClient

from experiments.actions.token import issue
from experiments.models import Project, Role, Token, Worker
from tests.experiments.engine import people

pytestmark = pytest.mark.django_db
HELLO = {"name": "gpu-1", "host": "h", "pid": 1, "version": "0", "devices": [], "slots": 1}
OTHER = "eve"


def token(name: str, project: Project | None = None) -> tuple[Token, APIClient]:
    """A worker's token of that user, who edits the default project, and a client that sends it."""
    issued = issue(user=people.user(name, Project.default(), Role.EDITOR), name="w", scopes=["worker"], project=project)
    return issued.token, APIClient(headers={"Authorization": f"Bearer {issued.secret}"})


def hello(client: APIClient) -> Response:
    return client.post("/api/v1/worker/hello", HELLO, format="json")


def held() -> Worker:
    """The worker, which Ada's token holds."""
    assert hello(token("ada")[1]).status_code == 200
    return Worker.objects.get(name="gpu-1")


def test_anothers_token_is_told_whose_the_name_is_and_changes_nothing() -> None:
    worker, (_, eve) = held(), token(OTHER)
    before = Worker.objects.filter(pk=worker.pk).values().get()
    answer = hello(eve)
    assert answer.status_code == 409
    assert answer.json()["errors"] == [
        {
            "pointer": "/name",
            "detail": "name: the worker gpu-1 is held by ada. Give this one another name (MOELAB_WORKER_NAME), use a token of ada,"
            " or have an administrator release the name on the page Workers",
        }
    ]
    asked: dict[str, Any] = {"claim": {"free_slots": 1, "free_devices": ["cpu:0"]}, "generations/claim": {}}
    run = people.queued(owner=people.user(OTHER))
    for what, body in asked.items():
        answer = eve.post(f"/api/v1/worker/{what}", {"worker": worker.pk, **body}, format="json")
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (409, "/worker"), what
    run.refresh_from_db()
    assert run.state == "queued" and Worker.objects.filter(pk=worker.pk).values().get() == before


def test_a_new_token_of_the_holder_takes_over_and_the_old_one_may_be_gone() -> None:
    worker = held()
    Token.objects.filter(pk=worker.token_id).update(revoked_at=worker.last_seen)
    assert hello(token(OTHER)[1]).status_code == 409, "a revoked token keeps its name"
    rotated, client = token("ada")
    assert hello(client).json() == {"worker": worker.pk}
    worker.refresh_from_db()
    assert worker.token == rotated


def test_a_token_that_reaches_less_far_does_not_take_over() -> None:
    bound, narrow = token("ada", Project.default())
    assert hello(narrow).status_code == 200
    other = Project.objects.create(name="other")
    people.user("ada", other, Role.EDITOR)
    refused = hello(token("ada", other)[1])
    assert refused.status_code == 409 and f"(token {bound.prefix}… for project {Project.default().name})" in refused.json()["detail"]
    assert hello(token("ada", Project.default())[1]).status_code == 200
    assert hello(token("ada")[1]).status_code == 200
    assert hello(narrow).status_code == 409


def test_an_administrator_releases_a_name_and_who_says_it_next_holds_it(client: Client) -> None:
    worker, (theirs, eve) = held(), token(OTHER)
    root = people.user("root", is_superuser=True)
    client.force_login(people.ada())
    assert "data-release" not in client.get("/workers").content.decode()
    assert client.post(f"/api/v1/workers/{worker.pk}/release").status_code == 403
    client.force_login(root)
    assert f'data-release="{worker.pk}"' in client.get("/workers").content.decode()
    assert client.get("/api/v1/workers").json()["items"][0]["held_by"] == "ada"
    for _ in range(2):
        assert client.post(f"/api/v1/workers/{worker.pk}/release", content_type="application/json").status_code == 204
    assert client.get("/api/v1/workers").json()["items"][0]["held_by"] is None
    assert "nobody" in client.get("/workers").content.decode()
    assert client.post("/api/v1/workers/99999999999999999999/release", content_type="application/json").status_code == 404
    assert hello(eve).json() == {"worker": worker.pk}
    assert Worker.objects.get(pk=worker.pk).token == theirs
