"""What a refused request is told: the field, parameter or header at fault, and its limit."""

from __future__ import annotations

from typing import Any

import pytest
from rest_framework.test import APIClient

from experiments.actions.transition import possible
from experiments.models import TERMINAL, Desired, Project, Role, Run, State
from tests.experiments.engine import people
from tests.experiments.engine.conftest import Speak

pytestmark = pytest.mark.django_db
RUNS = "/api/v1/runs"
QUERIES = [
    (f"{RUNS}?limit=201", "limit: should be less than or equal to 200"),
    (f"{RUNS}?state=foo", "state.0: must be one of queued"),
    (f"{RUNS}?state=queued&state=foo", "state.1: must be one of queued"),
    (f"{RUNS}?starred=maybe", "starred: should be a valid boolean, not"),
    (f"{RUNS}?colour=red", "colour: is not known here"),
    (RUNS + "/{run}?timeout=61", "timeout: should be less than or equal to 60"),
    (RUNS + "/{run}/diff?against=99999", "against: there is no run 99999"),
    (RUNS + "/{run}/generations?limit=0", "limit: should be greater than or equal to 1"),
]
BODIES = [
    ("post", RUNS, {"preset": "nano-mixtral", "tags": ["a", "x" * 65]}, "/tags/1", "tags.1: should have at most 64 characters, not"),
    ("post", RUNS, {"preset": "nano-mixtral", "tags": ["x"] * 33}, "/tags", 'tags: should have at most 32 items, not ["x"'),
    ("post", RUNS, {"preset": "nano-mixtral", "project": "elsewhere"}, "/project", "project: there is no project elsewhere"),
    ("post", RUNS, {"preset": "nano-mixtral", "priority": 1001}, "/priority", "priority: should be less than or equal to 1000, not 1001"),
    ("post", RUNS, {"preset": "nano-mixtral", "resume_from": {"run": 99999}}, "/resume_from", "resume_from: run 99999 has no such checkpoint"),
    ("post", f"{RUNS}/record", {}, "/name", "name: is missing"),
    ("post", f"{RUNS}/validate", {"spec": 5}, "/spec", "spec: should be a mapping of fields, not 5"),
    ("post", f"{RUNS}/bulk", {"action": "archive", "ids": []}, "/ids", "ids: should have at least 1 item, not []"),
    ("patch", RUNS + "/{run}", {"name": None}, "/name", "name: null is no value"),
    ("post", "/api/v1/tokens", {"name": "t", "scopes": ["king"]}, "/scopes/0", "scopes.0: should be 'read', "),
    ("post", "/api/v1/tokens", {"name": "t", "scopes": ["read"], "expires_at": "soon"}, "/expires_at", 'date, not "soon"'),
    ("post", "/api/v1/price", {"spec": {"data": {"weights": [-1]}}}, "/spec/data/weights/0", "weights.0: should be greater than"),
]


@pytest.fixture
def run() -> Run:
    return people.queued()


@pytest.mark.parametrize(("path", "said"), QUERIES)
def test_a_parameter(ada: APIClient, run: Run, path: str, said: str) -> None:
    answer = ada.get(path.format(run=run.pk))
    [error] = answer.json()["errors"]
    assert (answer.status_code, error["parameter"]) == (400, said.split(":")[0].split(".")[0])
    assert error["detail"].startswith(said) and said in answer.json()["detail"]


CLOSED = ["me", "presets", "presets/nano-mixtral", "projects", "schema", "schema/spec", "tokens", "workers", "runs", "runs/{run}"]
VIEWS = ("transitions", "checkpoints", "nodes", "metrics", "export/metrics.csv", "steps", "logs", "events", "placement")
CLOSED += [f"runs/{{run}}/{view}" for view in VIEWS]


@pytest.mark.parametrize("path", CLOSED)
def test_a_parameter_that_nobody_knows(ada: APIClient, run: Run, path: str) -> None:
    answer = ada.get(f"/api/v1/{path.format(run=run.pk)}?colour=red")
    assert (answer.status_code, answer.json()["errors"]) == (400, [{"parameter": "colour", "detail": "colour: is not known here"}])


@pytest.mark.parametrize(("method", "path", "body", "pointer", "said"), BODIES)
def test_a_field(ada: APIClient, run: Run, method: str, path: str, body: Any, pointer: str, said: str) -> None:
    answer = getattr(ada, method)(path.format(run=run.pk), body)
    [error] = answer.json()["errors"]
    assert (answer.status_code, error["pointer"]) == (422, pointer)
    assert said in error["detail"] and said in answer.json()["detail"]


def test_a_header(ada: APIClient, run: Run) -> None:
    answers = [
        ada.post(RUNS, {"preset": "nano-mixtral"}, headers={"Idempotency-Key": "x" * 201}),
        ada.patch(f"{RUNS}/{run.pk}", {"name": "new"}, headers={"If-Match": '"old"'}),
        ada.generic("POST", RUNS, "a=1", content_type="text/plain"),
    ]
    assert [answer.status_code for answer in answers] == [400, 412, 415]
    for answer, header in zip(answers, ("Idempotency-Key", "If-Match", "Content-Type"), strict=True):
        [error] = answer.json()["errors"]
        assert error["header"] == header and error["detail"].startswith(f"{header}: ")


def test_what_one_may_not_do_says_what_it_takes(as_user: Speak, run: Run) -> None:
    reader, viewer = as_user(people.ada(), "read"), as_user(people.user("vic", Project.default(), Role.VIEWER))
    assert reader.post(f"{RUNS}/{run.pk}/cancel").json()["detail"] == "it takes a token with the scope write; this one has read"
    assert viewer.post(f"{RUNS}/{run.pk}/cancel").json()["detail"] == "it takes the role editor in the project"
    assert as_user(people.ada()).post("/api/v1/projects", {"name": "new"}).json()["detail"].startswith("it takes an administrator")


ABSENT = [
    ("get", "runs/999", "there is no run 999, or you may not see it"),
    ("post", "runs/999/cancel", "there is no run 999, or you may not see it"),
    ("get", "projects/999/members", "there is no project 999, or you may not see it"),
    ("get", "nowhere/9", "there is nothing at /api/v1/nowhere/9; GET /api/v1/schema lists what there is"),
    ("get", "presets/none", "no preset 'none', only nano-"),
    ("get", "runs/{run}/export/x.csv", "there is no export 'x.csv', only metrics.csv, "),
    ("get", "runs/{run}/generations/9", "run {run} has no generation 9"),
    ("delete", "tokens/999", "you have no token 999"),
]


@pytest.mark.parametrize(("method", "path", "said"), ABSENT)
def test_what_there_is_not(ada: APIClient, run: Run, method: str, path: str, said: str) -> None:
    answer = getattr(ada, method)(f"/api/v1/{path.format(run=run.pk)}")
    problem = answer.json()
    assert (answer.status_code, problem["title"], problem["errors"]) == (404, "There is no such thing", [])
    assert said.format(run=run.pk) in problem["detail"]


def test_a_method_that_is_not_there_names_those_that_are(ada: APIClient, run: Run) -> None:
    asked = [("PUT", f"{RUNS}/{run.pk}", "GET, PATCH, DELETE"), ("GET", f"{RUNS}/bulk", "POST"), ("OPTIONS", RUNS, "GET, POST")]
    for method, path, there in asked:
        answer = ada.generic(method, path)
        assert (answer.status_code, answer.headers["Allow"], answer.json()["errors"]) == (405, there, [])
        assert answer.json()["detail"] == f"{method} is not possible at {path}, only {there}"


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("state", State)
def test_a_conflict_names_the_state_and_just_what_it_allows(ada: APIClient, state: str, recorded: bool) -> None:
    def ask(verb: str) -> Any:
        """Asks a fresh run, so that no answer changes the next one's."""
        made = people.queued()
        desired = {"pausing": Desired.PAUSE, "paused": Desired.PAUSE, "stopping": Desired.CANCEL, "cancelled": Desired.CANCEL}.get(state, Desired.RUN)
        Run.objects.filter(pk=made.pk).update(state=state, recorded=recorded, desired=desired)
        return ada.post(f"{RUNS}/{made.pk}/{verb}")

    answers = {verb: ask(verb) for verb in ("checkpoint", "pause", "resume", "cancel", "restart", "clone")}
    refused = {verb: answer.json() for verb, answer in answers.items() if answer.status_code == 409}
    assert refused and all(answer.status_code in (201, 202, 409) for answer in answers.values())
    for problem in refused.values():
        assert problem["errors"] == [] and f" is {state}: it cannot " in problem["detail"]
        listed = problem["detail"].partition("possible now: ")[2]
        assert ("delete" in listed) == ("delete (an administrator of the project)" in listed), "an editor may not"
        offered = {verb.partition(" (")[0] for verb in listed.split(", ")} - {"nothing"}
        assert offered == set(possible(Run(state=state, recorded=recorded)))
        assert not offered & set(refused), "what is offered is not refused"
        harmless = {"pause", "resume", "cancel"}
        assert set(answers) - set(refused) - offered <= harmless, "what is done, or is so already"
    assert ("delete" in possible(Run(state=state, recorded=recorded))) == (state in TERMINAL)
