"""Generations over the API: what is refused at the door, who may ask, and that exactly one attempt of one worker answers."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.utils import timezone
from rest_framework.test import APIClient

from experiments.actions.generate import MAX_WAITING
from experiments.actions.serve_generation import claim_generation, take_back
from experiments.actions.token import issue
from experiments.models import Checkpoint, Generation, Project, Role, Run, Token, Worker
from experiments.reconcile import reconcile_once
from tests.experiments.engine import people
from tests.experiments.engine.conftest import Speak

SHA = "ab" * 32


def saved(run: Run, *steps: int, deleted: bool = False) -> None:
    for step in steps:
        Checkpoint.objects.create(run=run, attempt=1, step=step, path="/c", size_bytes=1, sha256=SHA, seconds=1, at=timezone.now(), deleted=deleted)


def result(tokens: int = 3) -> dict[str, Any]:
    """What a worker says of the tiny run: two MoE layers of four experts, two of them for each token."""
    return {
        "step": 20, "prompt_tokens": 1, "stopped": "length", "ids": [104] * tokens, "texts": ["h"] * tokens,
        "log_probs": [None, *[-1.5] * (tokens - 1)],
        "moe_layers": [0, 1], "n_experts": 4, "experts": [[[0, 1], [3]]] * tokens, "gates": [[[0.75, 0.25], [1.0]]] * tokens,
        "usage": [[tokens, tokens, 0, 0], [0, 0, 0, tokens]], "batch_dependent": False, "notes": [], "seconds": 0.5,
    }  # fmt: skip


@pytest.fixture
def run(db: None) -> Run:
    made = people.queued()
    saved(made, 10, 20)
    return made


@pytest.fixture
def host(as_user: Speak) -> APIClient:
    return as_user(people.ada(), "worker")


def ask(client: APIClient, run: Run, key: str | None = None, **body: Any) -> Any:
    headers = {"Idempotency-Key": key} if key else {}
    return client.post(f"/api/v1/runs/{run.pk}/generations", body, "json", headers=headers)


def take(host: APIClient, worker: Worker) -> Any:
    return host.post("/api/v1/worker/generations/claim", {"worker": worker.pk}, "json")


def say(host: APIClient, offer: dict[str, Any], verb: str = "answer", **body: Any) -> Any:
    return host.post(f"/api/v1/worker/generations/{offer['generation']}/{verb}", {"attempt": offer["attempt"], **body}, "json")


class TestTheDoor:
    def test_a_generation_is_queued_and_read_again(self, ada: APIClient, run: Run) -> None:
        answer = ask(ada, run, prompt="def ", tokens=9, temperature=0, seed=4)
        made = answer.json()
        assert answer.status_code == 201 and answer.headers["Location"] == f"/api/v1/runs/{run.pk}/generations/{made['id']}"
        assert (made["state"], made["prompt"], made["creator"], made["result"]) == ("queued", "def ", "ada", None)
        assert made["parameters"] == {"tokens": 9, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 4}
        assert ada.get(answer.headers["Location"]).json() == made
        listed = ada.get(f"/api/v1/runs/{run.pk}/generations").json()["items"]
        assert listed == [{name: value for name, value in made.items() if name != "result"}]

    @pytest.mark.parametrize(
        ("body", "pointer", "said"),
        [
            ({"tokens": 0}, "/tokens", "greater than or equal to 1"),
            ({"tokens": 513}, "/tokens", "512"),
            ({"prompt": "x" * 4001}, "/prompt", "4000"),
            ({"temperature": -0.1}, "/temperature", "greater than or equal to 0"),
            ({"top_p": 0}, "/top_p", "greater than 0"),
            ({"top_k": -1}, "/top_k", "0"),
            ({"seed": 2**31}, "/seed", "2147483647"),
            ({"step": 11}, "/step", "no checkpoint at step 11"),
            ({"temprature": 1}, "/temprature", "not known here"),
        ],
    )
    def test_what_is_wrong_is_named_with_its_limit(self, ada: APIClient, run: Run, body: dict[str, Any], pointer: str, said: str) -> None:
        answer = ask(ada, run, **body)
        assert answer.status_code == 422 and answer.headers["Content-Type"] == "application/problem+json"
        assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
        assert said in answer.json()["errors"][0]["detail"]

    def test_an_answer_that_would_be_too_large_is_refused(self, ada: APIClient, run: Run) -> None:
        Run.objects.filter(pk=run.pk).update(moe_layers=list(range(60)), top_k=8)
        answer = ask(ada, run, prompt="é" * 10, tokens=120)
        assert answer.status_code == 422
        assert "480 experts for each token" in answer.json()["errors"][0]["detail"] and "136" in answer.json()["errors"][0]["detail"]
        assert ask(ada, run, prompt="é" * 8, tokens=120).status_code == 201

    def test_without_a_checkpoint_there_is_nothing_to_ask(self, ada: APIClient, db: None) -> None:
        bare = people.queued()
        assert ask(ada, bare).status_code == 409
        saved(bare, 5, deleted=True)
        answer = ask(ada, bare)
        assert answer.status_code == 409 and "no checkpoint" in answer.json()["detail"]

    def test_a_run_bears_only_so_many_at_once(self, ada: APIClient, run: Run) -> None:
        assert [ask(ada, run).status_code for _ in range(21)] == [201] * 20 + [409]

    def test_the_same_key_makes_no_second_one(self, ada: APIClient, run: Run) -> None:
        first, again = ask(ada, run, key="k", prompt="a"), ask(ada, run, key="k", prompt="a")
        assert (first.status_code, again.status_code) == (201, 200) and first.json() == again.json()
        assert ask(ada, run, key="k", prompt="b").status_code == 422
        assert ask(ada, run, key="\n", prompt="b").status_code == 400
        assert Generation.objects.count() == 1

    def test_viewers_read_and_editors_ask(self, as_user: Speak, run: Run) -> None:
        made = ask(as_user(), run).json()
        vic, olga = people.user("vic", Project.default(), Role.VIEWER), people.user("olga")
        path = f"/api/v1/runs/{run.pk}/generations"
        assert as_user(vic).get(f"{path}/{made['id']}").status_code == 200
        assert (ask(as_user(vic), run).status_code, ask(as_user(olga), run).status_code, as_user(olga).get(path).status_code) == (403, 404, 404)
        other = people.queued()
        assert as_user().get(f"/api/v1/runs/{other.pk}/generations/{made['id']}").status_code == 404

    def test_one_is_forgotten_by_editors_and_its_worker_is_told_to_stop(self, ada: APIClient, as_user: Speak, host: APIClient, run: Run) -> None:
        path = f"/api/v1/runs/{run.pk}/generations/{ask(ada, run).json()['id']}"
        offer = take(host, people.worker()).json()
        vic = as_user(people.user("vic", Project.default(), Role.VIEWER))
        assert (vic.delete(path).status_code, ada.delete(path).status_code, ada.get(path).status_code) == (403, 204, 404)
        assert say(host, offer, "heartbeat").status_code == 404

    def test_pages_follow_each_other(self, ada: APIClient, run: Run) -> None:
        ids = [ask(ada, run).json()["id"] for _ in range(5)]
        path, seen = f"/api/v1/runs/{run.pk}/generations?limit=2", []
        cursor: str | None = ""
        while cursor is not None:
            page = ada.get(path + (f"&cursor={cursor}" if cursor else "")).json()
            seen += [item["id"] for item in page["items"]]
            cursor = page["next_cursor"]
        assert seen == ids[::-1]


class TestTheWorker:
    def test_it_gets_all_that_it_needs_and_its_answer_is_kept(self, ada: APIClient, host: APIClient, run: Run) -> None:
        made, worker = ask(ada, run, prompt="hi", tokens=2).json(), people.worker()
        offer = take(host, worker).json()
        assert offer == {
            "generation": made["id"], "attempt": 1, "run": run.pk, "step": 20, "sha256": SHA, "prompt": "hi",
            "parameters": made["parameters"], "lease_s": 30, "heartbeat_s": 5, "place": None, "spec": None,
        }  # fmt: skip
        assert take(host, worker).status_code == 204
        assert say(host, offer, "heartbeat").status_code == 200
        assert say(host, offer, outcome="succeeded", result=result()).status_code == 200
        shown = ada.get(f"/api/v1/runs/{run.pk}/generations/{made['id']}").json()
        assert (shown["state"], shown["step"], shown["worker"], shown["result"]) == ("succeeded", 20, worker.name, result())
        assert say(host, offer, outcome="failed").status_code == 409, "it has ended"

    def test_the_step_that_was_asked_for_is_taken(self, ada: APIClient, host: APIClient, run: Run) -> None:
        ask(ada, run, step=10)
        assert take(host, people.worker()).json()["step"] == 10

    def test_a_failure_has_its_reason(self, ada: APIClient, host: APIClient, run: Run) -> None:
        made = ask(ada, run).json()
        say(host, take(host, people.worker()).json(), outcome="failed", reason="oom", detail="too small a host")
        shown = ada.get(f"/api/v1/runs/{run.pk}/generations/{made['id']}").json()
        assert (shown["state"], shown["reason"]) == ("failed", "oom")

    @pytest.mark.parametrize(
        "change",
        [
            {"experts": [[[0, 4], [3]]] * 3},
            {"experts": [[[0, 1]]] * 3},
            {"gates": [[[0.5], [1.0]]] * 3},
            {"texts": ["h"] * 2},
            {"usage": [[3, 3, 0, 0]]},
            {"prompt_tokens": 4},
            {"texts": ["h", "h", "x" * 201]},
        ],
    )
    def test_an_answer_that_does_not_hold_together_is_refused(self, ada: APIClient, host: APIClient, run: Run, change: dict[str, Any]) -> None:
        ask(ada, run)
        offer = take(host, people.worker()).json()
        assert say(host, offer, outcome="succeeded", result={**result(), **change}).status_code == 422
        assert say(host, offer, outcome="succeeded").status_code == 422
        assert say(host, offer, outcome="failed", result=result()).status_code == 422

    def test_only_workers_of_editors_are_asked(self, ada: APIClient, as_user: Speak, host: APIClient, run: Run) -> None:
        ask(ada, run)
        vic = as_user(people.user("vic", Project.default(), Role.VIEWER), "worker")
        worker = people.worker()
        assert take(vic, people.worker("vic's", token=Token.objects.get(user__username="vic"))).status_code == 204
        offer = take(host, worker).json()
        assert say(vic, offer, "heartbeat").status_code == 404
        assert take(ada, worker).status_code == 403, "a person's token takes no work"

    def test_a_worker_of_another_project_can_neither_keep_nor_answer_it(self, ada: APIClient, as_user: Speak, host: APIClient, run: Run) -> None:
        ask(ada, run)
        offer = take(host, people.worker()).json()
        elsewhere = as_user(people.user("olga", Project.objects.create(name="theirs"), Role.ADMIN), "worker")
        for verb, body in (("heartbeat", {}), ("answer", {"outcome": "succeeded", "result": result()}), ("answer", {"outcome": "not_here"})):
            assert say(elsewhere, offer, verb, **body).status_code == 404
        assert Generation.objects.get().state == "running"

    def test_one_that_has_not_the_checkpoint_sends_it_on_to_another(self, ada: APIClient, host: APIClient, run: Run) -> None:
        made, first, second = ask(ada, run).json(), people.worker("first"), people.worker("second")
        say(host, take(host, first).json(), outcome="not_here")
        assert take(host, first).status_code == 204
        offer = take(host, second).json()
        assert offer["attempt"] == 2
        say(host, offer, outcome="not_here")
        shown = ada.get(f"/api/v1/runs/{run.pk}/generations/{made['id']}").json()
        assert (shown["state"], shown["reason"]) == ("failed", "checkpoint_not_here") and "step 20" in shown["detail"]

    def test_one_that_was_outrun_by_a_newer_checkpoint_is_asked_again(self, ada: APIClient, host: APIClient, run: Run) -> None:
        ask(ada, run)
        worker = people.worker()
        offer = take(host, worker).json()
        saved(run, 30)
        say(host, offer, outcome="not_here")
        assert take(host, worker).json()["step"] == 30

    def test_a_checkpoint_that_is_gone_fails(self, ada: APIClient, host: APIClient, run: Run) -> None:
        made = ask(ada, run, step=10).json()
        Checkpoint.objects.filter(run=run, step=10).update(deleted=True)
        assert take(host, people.worker()).status_code == 204
        assert Generation.objects.get(pk=made["id"]).reason == "checkpoint_gone"

    def test_a_dead_workers_generation_is_handed_out_again_and_its_word_no_longer_counts(self, ada: APIClient, host: APIClient, run: Run) -> None:
        made, worker = ask(ada, run).json(), people.worker()
        offers = []
        for attempt in (1, 2, 3):
            offers.append(take(host, worker).json())
            assert offers[-1]["attempt"] == attempt
            assert take_back() is False, "its lease holds"
            Generation.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
            assert take_back() is (attempt < 3)
        assert say(host, offers[0], outcome="succeeded", result=result()).status_code == 409
        assert Generation.objects.get(pk=made["id"]).reason == "worker_lost"

    def test_what_nobody_takes_ends(self, ada: APIClient, run: Run) -> None:
        ask(ada, run)
        assert take_back() is True
        Generation.objects.update(created_at=timezone.now() - timedelta(minutes=11))
        assert take_back() is False
        assert Generation.objects.get().reason == "no_worker"

    def test_what_stands_behind_another_goes_on_waiting(self, ada: APIClient, host: APIClient, run: Run) -> None:
        ask(ada, run), ask(ada, run)
        take(host, people.worker())
        Generation.objects.update(created_at=timezone.now() - timedelta(minutes=11))
        assert take_back() is True

    def test_what_was_taken_back_late_may_go_to_another(self, ada: APIClient, host: APIClient, run: Run) -> None:
        ask(ada, run)
        take(host, people.worker())
        gone, long_ago = timezone.now() - timedelta(seconds=1), timezone.now() - timedelta(minutes=11)
        Generation.objects.update(created_at=long_ago, lease_until=gone)
        assert take_back() is True, "it stood in a queue, then its worker vanished: another may have the checkpoint"
        Generation.objects.update(started_at=long_ago)
        assert take_back() is False

    def test_the_reconciler_judges_no_lease_before_it_is_trusted(self, ada: APIClient, host: APIClient, run: Run) -> None:
        ask(ada, run)
        take(host, people.worker())
        Generation.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
        reconcile_once()
        assert Generation.objects.get().state == "running", "no web process has been up for long"


@pytest.mark.django_db(transaction=True)
def test_of_many_workers_at_once_exactly_one_gets_it() -> None:
    run = people.queued()
    saved(run, 20)
    Generation.objects.create(run=run, creator=people.ada(), prompt="", parameters={"tokens": 1})
    workers = [people.worker(f"w{i}") for i in range(6)]
    barrier, got = threading.Barrier(len(workers)), []

    def race(worker: Worker) -> None:
        barrier.wait()
        try:
            got.append(claim_generation(Run.objects.all(), worker=worker))
        finally:
            connection.close()

    threads = [threading.Thread(target=race, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(offer is not None for offer in got) == 1


def asked_at_once(run: Run, keys: list[str | None]) -> list[int]:
    """The statuses of as many requests as there are keys, all at the same moment."""
    secret = issue(user=people.ada(), name="t", scopes=["write"]).secret
    barrier, statuses = threading.Barrier(len(keys)), []

    def race(key: str | None) -> None:
        client = APIClient(raise_request_exception=False)
        client.credentials(HTTP_AUTHORIZATION=f"Bearer {secret}")
        barrier.wait()
        try:
            statuses.append(ask(client, run, key=key, prompt="x").status_code)
        finally:
            connection.close()

    threads = [threading.Thread(target=race, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(statuses)


@pytest.mark.django_db(transaction=True)
def test_the_same_request_twice_at_once_makes_one() -> None:
    run = people.queued()
    saved(run, 20)
    assert asked_at_once(run, ["same"] * 4) == [200, 200, 200, 201] and Generation.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_requests_at_once_do_not_pass_the_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.actions.generate.ring_after_commit", lambda: time.sleep(0.3))  # written, and not yet to be seen
    run = people.queued()
    saved(run, 20)
    for _ in range(MAX_WAITING - 1):
        Generation.objects.create(run=run, creator=people.ada(), prompt="", parameters={"tokens": 1})
    assert asked_at_once(run, [None] * 6) == [201, *[409] * 5] and Generation.objects.count() == MAX_WAITING
