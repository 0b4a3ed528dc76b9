"""The walk: every route of the resolver × every method × everybody, against the committed table. A route without a row fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver
from django.utils import timezone

from experiments.actions.claim import claim
from experiments.actions.token import issue
from experiments.models import Project, Role, Run, Token
from experiments.routes import OPEN, ROUTES, WEBSOCKETS, Need
from tests.experiments.engine import people

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
API = "api/v1/"
DOCS = f"{API}docs"
"""A page, though its address is the API's."""
NOWHERE = rf"{API}^[\s\S]*\Z"


def walk(patterns: Any, before: str = "") -> Iterator[str]:
    for pattern in patterns:
        if isinstance(pattern, URLResolver):
            yield from walk(pattern.url_patterns, before + str(pattern.pattern))
        elif isinstance(pattern, URLPattern):
            yield before + str(pattern.pattern)


EVERY = sorted(set(walk(get_resolver().url_patterns)) - {NOWHERE})


@dataclass
class World:
    """A project with one finished and one queued run, and everybody who might ask about them."""

    project: Project
    run: Run
    clients: dict[str, Client]

    def path(self, route: str) -> str:
        """An address that the route matches."""
        kwargs = {
            "<int:run_id>": self.run.pk,
            "<int:project_id>": self.project.pk,
            "<int:user_id>": 2**40,
            "<int:token_id>": 2**40,
            "<int:worker_id>": 2**40,
            "<int:generation_id>": 2**40,
            "<str:name>": "nano-mixtral",
            "<path:name>": "loss",
            "<str:file>": "metrics.csv",
            "<str:panel>": "checkpoints",
            "<str:ticket>": "none",
        }
        for placeholder, value in kwargs.items():
            route = route.replace(placeholder, str(value))
        assert "<" not in route, f"the walk does not know what to put into {route}"
        return "/" + route


def bearer(secret: str) -> Client:
    return Client(raise_request_exception=False, headers={"Authorization": f"Bearer {secret}"})


@pytest.fixture
def world(db: None) -> World:
    project = Project.objects.create(name="theirs")
    users = {role: people.user(role, project, role) for role in Role.values}
    outsider, root = people.user("outsider", Project.default(), Role.ADMIN), people.user("root", is_superuser=True)
    run = people.queued(owner=users["editor"])
    Run.objects.filter(pk=run.pk).update(project=project, state="succeeded")
    ada = users["admin"]

    def token(*scopes: str, **kwargs: Any) -> Client:
        return bearer(issue(user=ada, name="t", scopes=scopes, **kwargs).secret)

    expired = issue(user=ada, name="t", scopes=["admin"], expires_at=timezone.now() - timedelta(seconds=1)).secret
    revoked = issue(user=ada, name="r", scopes=["admin"])
    Token.objects.filter(pk=revoked.token.pk).update(revoked_at=timezone.now())
    working = people.queued()
    handed = claim(Run.objects.filter(pk=working.pk), worker=people.worker(), free_slots=1, free_devices=["cpu:0"])
    assert handed is not None
    retired = people.user("retired", project, Role.ADMIN)
    retired_token = issue(user=retired, name="t", scopes=["admin"]).secret
    retired.is_active = False
    retired.save()
    people_tokens = {
        name: bearer(issue(user=user, name="t", scopes=["admin"]).secret) for name, user in {**users, "outsider": outsider, "root": root}.items()
    }
    return World(
        project,
        run,
        {
            "anonymous": Client(raise_request_exception=False),
            **people_tokens,
            "read token": token("read"),
            "write token": token("write"),
            "ingest token": token("ingest"),
            "worker token": token("worker"),
            "token of another project": token("admin", project=Project.default()),
            "run token": bearer(handed.token),
            "expired": bearer(expired),
            "revoked": bearer(revoked.secret),
            "retired user": bearer(retired_token),
            "not a token": bearer("mlk_" + "x" * 43),
        },
    )


NOBODY = {"anonymous", "run token", "expired", "revoked", "retired user", "not a token"}
ROLE = {"viewer": 1, "editor": 2, "admin": 3, "root": 4}
SCOPES = {"read token": {"read"}, "write token": {"read", "write"}, "ingest token": {"ingest"}, "worker token": {"worker"}}


def expected(who: str, need: Need | None, route: str) -> set[int] | None:
    """The only statuses that may come; None: anything but 401, 403, 404 for lack of rights, and never 5xx."""
    if who in NOBODY:
        return {401}
    if need is None:
        return {405}
    if need.scope not in SCOPES.get(who, {"read", "write", "admin"}):
        return {403}
    if need.superuser:
        return None if who == "root" else {403}
    if need.role and ("<int:run_id>" in route or "<int:project_id>" in route):
        if who in ("outsider", "token of another project"):
            return {404}
        if ROLE.get(who, 3) < ROLE[need.role]:
            return {403}
    return None


def test_every_route_has_its_row_and_every_row_its_route() -> None:
    declared = set(OPEN) | set(ROUTES)
    assert set(EVERY) - declared == set(), "routes that nobody has decided about"
    assert declared - set(EVERY) == set(), "rows for routes that do not exist"


def test_only_these_are_open() -> None:
    assert set(OPEN) == {"healthz", "readyz", "login", "login/ticket/<str:ticket>"}


@pytest.mark.parametrize("route", [route for route in EVERY if route.startswith(API) and route != DOCS])
def test_the_api_lets_in_whom_the_table_lets_in(world: World, route: str) -> None:
    wrong = []
    for who, client in world.clients.items():
        for method in METHODS:
            answer = client.generic(method, world.path(route), b"{}", "application/json")
            wanted = expected(who, ROUTES[route].get(method), route)
            right = answer.status_code in wanted if wanted else answer.status_code not in (401, 403, 405) and answer.status_code < 500
            if not right:
                wrong.append(f"{method} {route} as {who}: {answer.status_code}, not {wanted or 'let in'}")
            if answer.status_code >= 400:
                assert answer.headers["Content-Type"] == "application/problem+json"
            if not Run.objects.filter(pk=world.run.pk).exists():
                world_again(world)
    assert not wrong, "\n".join(wrong)


def world_again(world: World) -> None:
    """An allowed DELETE has deleted the run: put it back for those who follow."""
    run = people.queued(owner=people.user("editor"))
    Run.objects.filter(pk=run.pk).update(project=world.project, state="succeeded")
    world.run = Run.objects.get(pk=run.pk)


PAGES = [route for route in EVERY if (not route.startswith(API) or route == DOCS) and route not in OPEN]


@pytest.mark.parametrize("route", PAGES)
def test_pages_send_strangers_to_the_sign_in_and_hide_what_is_not_theirs(world: World, route: str) -> None:
    path = world.path(route)
    for who in ("anonymous", "admin"):  # A bearer token opens no page.
        answer = world.clients[who].get(path)
        assert answer.status_code in (302, 405) and (answer.status_code == 405 or answer.headers["Location"].startswith("/login?next=")), who
    for method in METHODS[1:]:
        assert world.clients["anonymous"].generic(method, path).status_code in (302, 401, 403, 405)
    of_a_run = "<int:run_id>" in route
    for name in ("viewer", "outsider"):
        client = Client(raise_request_exception=False)
        client.force_login(people.user(name))
        method = "GET" if "GET" in ROUTES[route] else "POST"
        answer = client.generic(method, path)
        if of_a_run and name == "outsider":
            assert answer.status_code == 404
        else:
            assert answer.status_code in (200, 302, 404) and (not of_a_run or answer.status_code == 200), (name, answer.status_code)


class TestTheBrowser:
    """A session cookie alone moves nothing."""

    @pytest.mark.parametrize("method", METHODS[1:])
    def test_without_a_csrf_token_nothing_is_changed(self, world: World, method: str) -> None:
        client = Client(enforce_csrf_checks=True, raise_request_exception=False)
        client.force_login(people.user("admin"))
        for route in (route for route in EVERY if method in ROUTES.get(route, {})):
            answer = client.generic(method, world.path(route), b"{}", "application/json", headers={"X-HTTP-Method-Override": "GET"})
            assert answer.status_code == 403, f"{method} {route}: {answer.status_code}"

    def test_a_strange_host_is_refused_everywhere(self, world: World) -> None:
        for route in EVERY:
            assert world.clients["admin"].get(world.path(route), headers={"Host": "evil.example"}).status_code == 400, route

    def test_every_answer_carries_the_policy(self, world: World) -> None:
        for path in ("/api/v1/runs", "/api/v1/nowhere", "/nowhere", "/login", "/healthz"):
            policy = Client().get(path).headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy


class TestWhatTheTableCannotSay:
    def test_the_project_in_a_body_must_be_ones_own(self, world: World) -> None:
        body = {"spec": people.TINY, "project": "theirs"}
        statuses = {who: world.clients[who].post("/api/v1/runs", body, "application/json").status_code for who in ("outsider", "viewer", "editor")}
        assert statuses == {"outsider": 422, "viewer": 403, "editor": 201}

    def test_lists_show_ones_own_only(self, world: World) -> None:
        def listed(who: str, path: str) -> list[Any]:
            return [item["id"] for item in world.clients[who].get(path).json()["items"]]

        assert listed("viewer", "/api/v1/runs") == [world.run.pk]
        assert world.run.pk not in listed("outsider", "/api/v1/runs")
        assert world.project.pk not in listed("outsider", "/api/v1/projects")
        assert listed("token of another project", "/api/v1/runs") == []

    def test_bulk_changes_only_what_one_may_edit(self, world: World) -> None:
        for who, done in (("outsider", []), ("viewer", []), ("editor", [world.run.pk])):
            body = {"action": "archive", "ids": [world.run.pk]}
            assert world.clients[who].post("/api/v1/runs/bulk", body, "application/json").json()["done"] == done, who

    def test_no_token_makes_one_that_reaches_further(self, world: World) -> None:
        bound = bearer(issue(user=people.user("admin"), name="b", scopes=["admin"], project=world.project).secret)
        made = bound.post("/api/v1/tokens", {"name": "x", "scopes": ["admin"]}, "application/json").json()
        assert made["project"] == "theirs"
        assert bound.post("/api/v1/tokens", {"name": "x", "scopes": ["read"], "project": "default"}, "application/json").status_code == 422
        for who, status in (("editor", 422), ("admin", 422), ("root", 201)):
            answer = world.clients[who].post("/api/v1/tokens", {"name": "w", "scopes": ["worker"]}, "application/json")
            assert answer.status_code == status, who
        for who, status in (("editor", 403), ("admin", 201)):
            body = {"name": "w", "scopes": ["worker"], "project": "theirs"}
            assert world.clients[who].post("/api/v1/tokens", body, "application/json").status_code == status, who

    def test_nobody_sees_or_revokes_anothers_token(self, world: World) -> None:
        token = Token.objects.filter(user__username="admin").first()
        assert token is not None
        assert world.clients["root"].delete(f"/api/v1/tokens/{token.pk}").status_code == 404
        assert world.clients["admin"].delete(f"/api/v1/tokens/{token.pk}").status_code == 204

    def test_a_worker_takes_only_runs_of_projects_that_its_owner_edits(self, world: World) -> None:
        Run.objects.update(state="queued") if not Run.objects.filter(state="succeeded").exists() else None
        run = people.queued(owner=people.user("editor"))
        Run.objects.filter(pk=run.pk).update(project=world.project)
        hello = {"host": "h", "pid": 1, "version": "1", "devices": [], "slots": 4}
        want = {"free_slots": 4, "free_devices": ["cpu:0"]}
        answers = {}
        for name in ("viewer", "outsider", "editor"):
            client = bearer(issue(user=people.user(name), name="w", scopes=["worker"]).secret)
            worker = client.post("/api/v1/worker/hello", {"name": f"of {name}", **hello}, "application/json").json()["worker"]
            answers[name] = client.post("/api/v1/worker/claim", {"worker": worker, **want}, "application/json")
        assert {name: answer.status_code for name, answer in answers.items()} == {"viewer": 204, "outsider": 204, "editor": 200}
        assert answers["editor"].json()["run"] == run.pk

    def test_fields_that_are_not_to_be_written_are_not(self, world: World) -> None:
        before = Run.objects.filter(pk=world.run.pk).values().get()
        writable = {"name", "notes", "tags", "starred", "archived", "priority"}
        for field in {field.name for field in Run._meta.fields} - writable:
            body = {field: before.get(field, 1), "name": "changed"}
            assert world.clients["admin"].patch(f"/api/v1/runs/{world.run.pk}", body, "application/json").status_code in (400, 422), field
        assert Run.objects.filter(pk=world.run.pk).values().get() == before


def test_sockets_are_in_the_table_too() -> None:
    from experiments.routing import websocket_urlpatterns

    assert {str(pattern.pattern) for pattern in websocket_urlpatterns} == set(WEBSOCKETS)
