"""Submitting: one transaction, a bell after it, a price before it."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
import redis
from celery import Celery
from django.conf import settings
from django.db import connection, transaction
from rest_framework.test import APIClient

from experiments import doorbell
from experiments.actions.cancel import cancel
from experiments.actions.describe import Refused, check, resolve
from experiments.actions.submit import submit
from experiments.models import IdempotencyKey, Run, Transition
from moelab.embedded import Valkey
from tests.experiments.engine import people
from tests.experiments.engine.conftest import Speak

RUNS = "/api/v1/runs"


@pytest.mark.django_db
class TestASubmission:
    def test_writes_the_run_with_its_first_transition(self, ada: APIClient) -> None:
        answer = ada.post(RUNS, {"spec": people.TINY, "name": "first", "tags": ["a", "b"], "notes": "why", "priority": 3})
        assert answer.status_code == 201
        run = Run.objects.get()
        assert answer.headers["Location"] == f"/api/v1/runs/{run.pk}"
        assert (run.name, run.state, run.tags, run.notes, run.priority, run.steps) == ("first", "queued", ["a", "b"], "why", 3, 20)
        assert run.spec["name"] == "first" and run.spec["model"]["moe"]["n_experts"] == 4
        assert (run.moe_layers, run.n_experts, run.top_k, run.tokens_per_step) == ([0, 1], 4, 2, 512)
        assert [(row.from_state, row.to_state, row.by) for row in Transition.objects.all()] == [("", "queued", "user:ada")]

    def test_of_a_preset_with_fields_changed(self, ada: APIClient) -> None:
        answer = ada.post(RUNS, {"preset": "nano-mixtral", "overrides": {"model.moe.top_k": 1, "training.steps": 7}})
        assert answer.status_code == 201
        assert (answer.json()["top_k"], answer.json()["steps"]) == (1, 7)

    @pytest.mark.parametrize(
        ("body", "pointer", "says"),
        [
            ({"spec": {"model": {"moe": {"top_k": 9, "n_experts": 8}}}}, "/spec/model/moe/top_k", "top_k 9 > n_experts 8"),
            ({"preset": "nano-mixtral", "overrides": {"model.moe.top_k": 9}}, "/overrides/model.moe.top_k", "9"),
            ({"preset": "nano-mixtral", "overrides": {"model.moe.topk": 9}}, "/overrides/model.moe.topk", "top_k"),
            ({"preset": "nano-mixtrol"}, "/preset", "nano-mixtral"),
            ({"spec": {"colour": 1}}, "/spec/colour", "not a field"),
            ({"spec": {}, "preset": "nano-mixtral"}, "", "either"),
            ({}, "", "either"),
            ({"spec": {}, "state": "succeeded"}, "/state", "not known here"),
            ({"spec": {}, "priority": "9"}, "/priority", "integer"),
            ({"spec": {}, "tags": ["x" * 65]}, "/tags/0", "64"),
            ({"spec": {}, "project": "../etc"}, "/project", "pattern"),
            ({"spec": {}, "resume_from": {"run": 1}}, "/resume_from", "no such checkpoint"),
        ],
    )
    def test_a_bad_one_is_told_where_and_why(self, ada: APIClient, body: dict[str, Any], pointer: str, says: str) -> None:
        answer = ada.post(RUNS, body)
        assert answer.status_code == 422 and answer.headers["Content-Type"] == "application/problem+json"
        errors = answer.json()["errors"]
        assert any(error["pointer"] == pointer and says in error["detail"] for error in errors), errors
        assert not Run.objects.exists()

    def test_validating_makes_nothing(self, ada: APIClient) -> None:
        for answer in (ada.post(f"{RUNS}/validate", {"spec": people.TINY}), ada.post(RUNS, {"spec": people.TINY, "validate_only": True})):
            assert answer.status_code == 200
            assert answer.json()["price"]["total_params"] > 0 and answer.json()["spec"]["training"]["steps"] == 20
        assert not Run.objects.exists()

    def test_a_trillion_parameters_are_refused_with_figure_and_limit_within_50_ms(self) -> None:
        spec = resolve({"model": {"d_model": 16_384, "n_layers": 128, "moe": {"n_experts": 512, "top_k": 8, "d_expert": 4096}}}, {})
        started = time.process_time()
        with pytest.raises(Refused) as refused:
            check(spec)
        assert time.process_time() - started < 0.05
        assert "1.3e13 parameters" in str(refused.value) and "limit 2.0e9" in str(refused.value)

    def test_it_begins_from_another_runs_checkpoint(self, ada: APIClient) -> None:
        first = people.queued()
        first.checkpoints.create(attempt=1, step=40, path="/c/40", size_bytes=1, sha256="", seconds=1, at=first.created_at)
        answer = ada.post(RUNS, {"spec": people.TINY, "resume_from": {"run": first.pk}})
        assert answer.status_code == 201
        run = Run.objects.get(pk=answer.json()["id"])
        assert run.parent_id == first.pk and run.resume_from == {"run": first.pk, "step": 40, "path": "/c/40", "host": ""}


@pytest.mark.django_db
class TestIdempotency:
    def test_the_same_again_is_the_same_run_and_another_body_is_refused(self, ada: APIClient) -> None:
        first = ada.post(RUNS, {"spec": people.TINY}, headers={"Idempotency-Key": "k1"})
        again = ada.post(RUNS, {"spec": people.TINY}, headers={"Idempotency-Key": "k1"})
        other = ada.post(RUNS, {"spec": {}}, headers={"Idempotency-Key": "k1"})
        assert (first.status_code, again.status_code, other.status_code) == (201, 200, 422)
        assert first.json()["id"] == again.json()["id"] and Run.objects.count() == 1

    def test_keys_are_each_users_own_and_a_refused_body_keeps_none(self, as_user: Speak) -> None:
        ada, bob = as_user(), as_user(people.user("bob", people.Project.default(), "editor"))
        assert ada.post(RUNS, {"spec": {"x": 1}}, headers={"Idempotency-Key": "k"}).status_code == 422
        assert not IdempotencyKey.objects.exists()
        ids = {who.post(RUNS, {"spec": people.TINY}, headers={"Idempotency-Key": "k"}).json()["id"] for who in (ada, bob)}
        assert len(ids) == 2

    def test_clones_and_restarts_have_it_too(self, ada: APIClient) -> None:
        run = people.queued()
        cancel(run.pk, by="user:ada")
        for verb, statuses in (("clone", [201, 200]), ("restart", [202, 202])):
            path, key = f"{RUNS}/{run.pk}/{verb}", {"Idempotency-Key": verb}
            answers = [ada.post(path, {}, headers=key) for _ in statuses]
            assert [answer.status_code for answer in answers] == statuses
            assert len({answer.json()["id"] for answer in answers}) == 1
        assert Run.objects.count() == 3
        other = ada.post(f"{RUNS}/{Run.objects.last().pk}/clone", {}, headers={"Idempotency-Key": "clone"})
        assert other.status_code == 422, "the same words about another run"

    @pytest.mark.parametrize("key", ["", "x" * 201, "ä"])
    def test_a_key_that_is_none(self, ada: APIClient, key: str) -> None:
        assert ada.post(RUNS, {"spec": people.TINY}, headers={"Idempotency-Key": key}).status_code == 400


@pytest.mark.django_db(transaction=True)
def test_a_key_that_is_still_being_worked_on_answers_409(as_user: Speak, monkeypatch: pytest.MonkeyPatch) -> None:
    clients, entered, go_on = [as_user(), as_user()], threading.Event(), threading.Event()

    def slow_submit(**kwargs: Any) -> Run:
        entered.set()
        go_on.wait(20)
        return submit(**kwargs)

    monkeypatch.setattr("experiments.api.runs.submit", slow_submit)
    statuses: list[int] = []

    def send(client: APIClient) -> None:
        statuses.append(client.post(RUNS, {"spec": people.TINY}, headers={"Idempotency-Key": "k"}).status_code)

    def send_and_close() -> None:
        send(clients[0])
        connection.close()

    first = threading.Thread(target=send_and_close)
    first.start()
    assert entered.wait(20)
    send(clients[1])
    go_on.set()
    first.join()
    assert statuses == [409, 201]
    send(clients[1])
    assert statuses[-1] == 200 and Run.objects.count() == 1


def wait_for_the_ringer() -> None:
    """Until everything that was to be rung has been."""
    doorbell._ringer.submit(lambda: None).result(5)


@pytest.mark.django_db(transaction=True)
class TestTheBell:
    def test_it_rings_after_the_commit_and_never_for_what_was_rolled_back(self, valkey: Valkey) -> None:
        queue = redis.Redis.from_url(settings.REDIS_URL)
        queue.delete(doorbell.QUEUE)
        with transaction.atomic():
            people.queued()
            wait_for_the_ringer()
            assert queue.llen(doorbell.QUEUE) == 0
        wait_for_the_ringer()
        assert queue.llen(doorbell.QUEUE) == 1
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            people.queued()
            raise ZeroDivisionError
        wait_for_the_ringer()
        assert queue.llen(doorbell.QUEUE) == 1

    def test_a_celery_app_of_no_relation_hears_it(self, valkey: Valkey) -> None:
        redis.Redis.from_url(settings.REDIS_URL).delete(doorbell.QUEUE)
        assert doorbell.ring()
        app = Celery(broker=settings.CELERY_BROKER_URL)
        with app.connection_for_read() as connection:
            message = connection.default_channel.basic_get(doorbell.QUEUE, no_ack=True)
        assert message is not None and message.headers["task"] == "workers.look_for_work"

    @pytest.mark.parametrize("fault", ["stopped", "killed"])
    def test_without_valkey_a_submission_still_answers_within_500_ms(self, ada: APIClient, valkey: Valkey, fault: str) -> None:
        ada.post(RUNS, {"spec": people.TINY})
        assert valkey.pid is not None
        if fault == "stopped":
            os.kill(valkey.pid, signal.SIGSTOP)
        else:
            valkey.stop()
        try:
            waits = []
            for _ in range(3):
                started = time.monotonic()
                answer = ada.post(RUNS, {"spec": people.TINY})
                waits.append(time.monotonic() - started)
                assert answer.status_code == 201 and answer.json()["state"] == "queued"
            assert ada.get("/api/v1/system").json()["valkey"] == "down"
            ready = ada.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        finally:
            if fault == "stopped":
                os.kill(valkey.pid, signal.SIGCONT)
            else:
                valkey.start()
            wait_for_the_ringer()
        assert sorted(waits)[1] < 0.5, waits
