"""Reading, finding, waiting for, editing and deleting runs."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from django.db import connection
from rest_framework.test import APIClient

from experiments.actions.cancel import cancel
from experiments.actions.edit import edit
from experiments.api.resources import RunResource
from experiments.models import Run, State
from tests.experiments.engine import people
from tests.experiments.engine.conftest import Speak

RUNS = "/api/v1/runs"


def names(answer: Any) -> list[str]:
    return [item["name"] for item in answer.json()["items"]]


@pytest.mark.django_db
class TestTheList:
    @pytest.fixture(autouse=True)
    def runs(self) -> list[Run]:
        made = []
        for i, loss in enumerate([2.5, 1.5, None, 3.5, None]):
            run = people.queued(name=f"run {i}")
            tags = ["even"] if i % 2 == 0 else ["odd", "100%"]
            Run.objects.filter(pk=run.pk).update(summary={"loss": loss, "other": i} if i < 4 else {}, tags=tags, notes=f"note_{i}", starred=i == 1)
            made.append(run)
        return made

    def test_newest_first_page_by_page_without_loss_or_double(self, ada: APIClient) -> None:
        seen, path = [], f"{RUNS}?limit=2"
        while path:
            answer = ada.get(path)
            seen += names(answer)
            link = answer.headers.get("Link", "")
            assert bool(link) == (answer.json()["next_cursor"] is not None)
            path = link.partition("<")[2].partition(">")[0]
            people.queued(name="late")
        assert seen == [f"run {i}" for i in (4, 3, 2, 1, 0)]

    @pytest.mark.parametrize(
        ("query", "found"),
        [
            ("order=loss", [1, 0, 3, 2, 4]),
            ("order=-loss", [3, 0, 1, 4, 2]),
            ("order=name", [0, 1, 2, 3, 4]),
            ("order=-name", [4, 3, 2, 1, 0]),
            ("order=created_at", [0, 1, 2, 3, 4]),
            ("metric=loss<2", [1]),
            ("metric=loss>=2.5&order=name", [0, 3]),
            ("metric=loss>1&metric=loss<3&order=name", [0, 1]),
            ("metric=nothing=0", []),
            ("tag=odd&order=name", [1, 3]),
            ("tag=odd&tag=even", []),
            ("q=note_3", [3]),
            ("q=note%25", []),
            ("q=100%25&order=name", [1, 3]),
            ("q=RUN%202", [2]),
            ("starred=true", [1]),
            ("starred=false&order=name", [0, 2, 3, 4]),
            ("archived=true", []),
            ("state=running", []),
            ("state=queued&state=running&order=name&limit=1", [0]),
            ("project=default&order=name", [0, 1, 2, 3, 4]),
            ("project=elsewhere", []),
        ],
    )
    def test_filters_and_orders(self, ada: APIClient, query: str, found: list[int]) -> None:
        assert names(ada.get(f"{RUNS}?{query}")) == [f"run {i}" for i in found]

    def test_the_loss_is_without_balancing_terms_where_a_run_tells_that_apart(self, ada: APIClient, runs: list[Run]) -> None:
        Run.objects.filter(pk=runs[3].pk).update(summary={"loss": 9.0, "lm_loss": 0.5})
        assert names(ada.get(f"{RUNS}?order=loss&limit=1")) == ["run 3"]

    @pytest.mark.parametrize("order", ["loss", "-loss", "name", "-created_at"])
    def test_a_cursor_of_each_order_goes_on_where_the_page_ended(self, ada: APIClient, order: str) -> None:
        whole = names(ada.get(f"{RUNS}?order={order}"))
        first = ada.get(f"{RUNS}?order={order}&limit=3")
        rest = ada.get(f"{RUNS}?order={order}&limit=3&cursor={first.json()['next_cursor']}")
        assert names(first) + names(rest) == whole
        assert ada.get(f"{RUNS}?order=created_at&cursor={first.json()['next_cursor']}").status_code == 400

    def test_it_takes_as_many_queries_for_many_runs_as_for_one(self, ada: APIClient, django_assert_max_num_queries: Any) -> None:
        ada.get(RUNS)
        with django_assert_max_num_queries(8):
            shown = ada.get(RUNS).json()["items"]
        assert len(shown) == 5 and all("sparkline" in item and "spec" not in item for item in shown)

    def test_every_field_is_in_the_documented_shape(self, ada: APIClient, runs: list[Run]) -> None:
        RunResource.model_validate(ada.get(f"{RUNS}?limit=1").json()["items"][0])
        Run.objects.filter(pk=runs[0].pk).update(summary={"loss": 1.0})
        RunResource.model_validate(ada.get(f"{RUNS}/{runs[0].pk}").json())


@pytest.mark.django_db
class TestOneRun:
    def test_its_etag_is_answered_with_304_until_it_changes(self, ada: APIClient) -> None:
        run = people.queued()
        first = ada.get(f"{RUNS}/{run.pk}")
        tag = first.headers["ETag"]
        assert first.json()["spec"]["training"]["steps"] == 20
        same = ada.get(f"{RUNS}/{run.pk}", headers={"If-None-Match": tag})
        assert (same.status_code, same.content) == (304, b"")
        edit(run.pk, notes="new")
        assert ada.get(f"{RUNS}/{run.pk}", headers={"If-None-Match": tag}).status_code == 200

    def test_progress_and_the_time_that_is_left(self, ada: APIClient) -> None:
        run = people.queued()
        Run.objects.filter(pk=run.pk).update(state=State.RUNNING, last_step=5, tokens_per_s=256.0)
        shown = ada.get(f"{RUNS}/{run.pk}").json()
        assert (shown["progress"], shown["seconds_left"]) == (0.25, 15 * 512 / 256)

    def test_edited_by_one_at_a_time(self, ada: APIClient) -> None:
        run = people.queued()
        tag = ada.get(f"{RUNS}/{run.pk}").headers["ETag"]
        answer = ada.patch(f"{RUNS}/{run.pk}", {"notes": "mine", "tags": ["x"], "starred": True}, headers={"If-Match": tag})
        assert answer.status_code == 200 and (answer.json()["notes"], answer.json()["tags"]) == ("mine", ["x"])
        late = ada.patch(f"{RUNS}/{run.pk}", {"notes": "theirs"}, headers={"If-Match": tag})
        assert late.status_code == 412 and Run.objects.get().notes == "mine"
        assert ada.patch(f"{RUNS}/{run.pk}", {"notes": "theirs"}).status_code == 200
        assert ada.patch(f"{RUNS}/{run.pk}", {"notes": None}).status_code == 422

    def test_deleted_only_once_it_has_ended(self, as_user: Speak) -> None:
        root, run = as_user(people.user("root", is_superuser=True)), people.queued()
        assert root.delete(f"{RUNS}/{run.pk}").status_code == 409
        cancel(run.pk, by="user:ada")
        assert root.delete(f"{RUNS}/{run.pk}").status_code == 204
        assert root.get(f"{RUNS}/{run.pk}").status_code == 404

    def test_what_it_changed_against_its_parent_or_another(self, ada: APIClient) -> None:
        run = people.queued(name="same")
        child = ada.post(f"{RUNS}/{run.pk}/clone", {"set": {"model.moe.top_k": 1, "optimizer.lr": 0.5}, "name": "same"}).json()
        assert child["parent"] == run.pk
        found = ada.get(f"{RUNS}/{child['id']}/diff").json()
        assert found["against"] == run.pk
        assert [(each["path"], each["before"], each["after"]) for each in found["changes"]] == [
            ("model.moe.top_k", 2, 1),
            ("optimizer.lr", 0.003, 0.5),
        ]
        assert ada.get(f"{RUNS}/{run.pk}/diff").json() == {"run": run.pk, "against": None, "changes": []}
        assert ada.get(f"{RUNS}/{run.pk}/diff?against=999").status_code == 400

    def test_a_bad_clone_points_at_the_value(self, ada: APIClient) -> None:
        answer = ada.post(f"{RUNS}/{people.queued().pk}/clone", {"set": {"model.moe.top_k": 99}})
        assert answer.status_code == 422 and answer.json()["errors"][0]["pointer"] == "/set/model.moe.top_k"

    def test_steered_by_verbs(self, ada: APIClient) -> None:
        run = people.queued()

        def ask(verb: str) -> tuple[int, str]:
            answer = ada.post(f"{RUNS}/{run.pk}/{verb}")
            return answer.status_code, answer.json().get("state", answer.json().get("detail"))

        assert ask("checkpoint") == (409, f"run {run.pk} is queued: it cannot save a checkpoint; possible now: pause, cancel, clone")
        assert ask("pause") == (202, "paused") and ask("pause") == (202, "paused")
        assert ask("resume") == (202, "queued") and ask("resume") == (202, "queued")
        assert ask("restart")[0] == 409
        assert ask("cancel") == (202, "cancelled") and ask("cancel") == (202, "cancelled")
        assert ask("resume")[0] == 409
        again = ada.post(f"{RUNS}/{run.pk}/restart")
        assert again.status_code == 202 and again.json()["parent"] == run.pk and again.headers["Location"].endswith(str(again.json()["id"]))
        history = ada.get(f"{RUNS}/{run.pk}/transitions").json()["items"]
        assert [row["to_state"] for row in history] == ["queued", "paused", "queued", "cancelled"]

    def test_many_at_once(self, ada: APIClient) -> None:
        runs = [people.queued().pk for _ in range(3)]
        Run.objects.filter(pk=runs[2]).update(state=State.SUCCEEDED)
        answer = ada.post(f"{RUNS}/bulk", {"action": "cancel", "ids": [*runs, 10**9]}).json()
        assert answer["done"] == runs[:2] and [each["id"] for each in answer["refused"]] == [runs[2], 10**9]
        assert ada.post(f"{RUNS}/bulk", {"action": "archive", "ids": runs}).json()["done"] == runs
        assert names(ada.get(RUNS)) == [] and len(names(ada.get(f"{RUNS}?archived=true"))) == 3


@pytest.mark.django_db(transaction=True)
class TestWaiting:
    def later(self, act: Any) -> threading.Thread:
        def run() -> None:
            time.sleep(0.3)
            act()
            connection.close()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def test_until_it_has_ended(self, ada: APIClient) -> None:
        run = people.queued()
        thread, started = self.later(lambda: cancel(run.pk, by="user:ada")), time.monotonic()
        answer = ada.get(f"{RUNS}/{run.pk}?wait=terminal&timeout=30")
        thread.join()
        assert answer.json()["state"] == "cancelled" and time.monotonic() - started < 10

    def test_until_it_has_changed_or_has_changed_already(self, ada: APIClient) -> None:
        run = people.queued()
        tag = ada.get(f"{RUNS}/{run.pk}").headers["ETag"]
        thread = self.later(lambda: edit(run.pk, notes="x"))
        answer = ada.get(f"{RUNS}/{run.pk}?wait=change&timeout=30", headers={"If-None-Match": tag})
        thread.join()
        assert answer.status_code == 200 and answer.json()["notes"] == "x"
        started = time.monotonic()
        assert ada.get(f"{RUNS}/{run.pk}?wait=change&timeout=30", headers={"If-None-Match": tag}).status_code == 200
        assert time.monotonic() - started < 5

    def test_not_longer_than_asked_and_at_most_a_minute(self, ada: APIClient) -> None:
        run = people.queued()
        assert ada.get(f"{RUNS}/{run.pk}?wait=terminal&timeout=0.3").json()["state"] == "queued"
        assert ada.get(f"{RUNS}/{run.pk}?wait=terminal&timeout=61").status_code == 400
        assert ada.get(f"{RUNS}/{run.pk}?wait=forever").status_code == 400

    def test_those_who_wait_hold_no_connection(self, as_user: Speak) -> None:
        run, clients = people.queued(), [as_user() for _ in range(60)]
        statuses: list[int] = []

        def wait(client: APIClient) -> None:
            statuses.append(client.get(f"{RUNS}/{run.pk}?wait=terminal&timeout=3").status_code)
            connection.close()

        threads = [threading.Thread(target=wait, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        assert as_user().get(f"{RUNS}/{run.pk}").status_code == 200, "60 wait, the pool has 40 connections"
        cancel(run.pk, by="user:ada")
        for thread in threads:
            thread.join()
        assert statuses == [200] * 60
