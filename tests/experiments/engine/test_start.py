"""Runs that start from another's weights: who may name it, what it must have, and the baseline to compare with."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone
from rest_framework.test import APIClient

from experiments.actions.claim import claim
from experiments.actions.token import issue
from experiments.models import Checkpoint, Project, Role, Run
from spec.accounting import price
from spec.baseline import dense_baseline
from spec.experiment import ExperimentSpec
from tests.experiments.engine import people
from tests.experiments.engine.conftest import Speak

RUNS = "/api/v1/runs"
BASELINE = "/api/v1/specs/dense-baseline"
DENSE: dict[str, Any] = {**people.TINY, "model": {**people.TINY["model"], "d_ff": 32, "moe": None}}


def saved(run: Run, *steps: int, attempt: int = 1, deleted: bool = False) -> Run:
    """`run` with checkpoints."""
    for step in steps:
        Checkpoint.objects.create(
            run=run, attempt=attempt, step=step, path="x", size_bytes=1, sha256="0" * 64, seconds=0.1, at=timezone.now(), deleted=deleted
        )
    return run


def starting(run: int, kind: str = "checkpoint", spec: dict[str, Any] = people.TINY, **start: Any) -> dict[str, Any]:
    return {"spec": {**spec, "start": {"kind": kind, "run": run, **start}}}


def errors(answer: Any) -> list[tuple[str, str]]:
    assert answer.status_code == 422, answer.content
    return [(error["pointer"], error["detail"]) for error in answer.json()["errors"]]


@pytest.mark.django_db
class TestAStart:
    def test_is_pinned_to_the_newest_checkpoint_and_the_run_is_the_parent(self, ada: APIClient) -> None:
        source = saved(people.queued(), 10, 20)
        saved(source, 30, deleted=True)
        answer = ada.post(RUNS, starting(source.pk))
        assert answer.status_code == 201
        run = Run.objects.get(pk=answer.json()["id"])
        assert run.spec["start"] == {"kind": "checkpoint", "run": source.pk, "path": None, "step": 20}
        assert run.parent == source
        assert ada.post(RUNS, starting(source.pk, step=10)).json()["spec"]["start"]["step"] == 10

    @pytest.mark.parametrize("path", [RUNS, f"{RUNS}/validate"])
    def test_that_one_may_not_see_is_answered_as_if_it_did_not_exist(self, ada: APIClient, path: str) -> None:
        theirs = Project.objects.create(name="theirs")
        olga = people.user("olga", theirs, Role.EDITOR)
        hidden = saved(people.queued(owner=olga), 10)
        Run.objects.filter(pk=hidden.pk).update(project=theirs)
        there, nowhere = errors(ada.post(path, starting(hidden.pk))), errors(ada.post(path, starting(hidden.pk + 1000)))
        assert [pointer for pointer, _ in there] == ["/spec/start/run"]
        assert there[0][1].replace(str(hidden.pk), "N") == nowhere[0][1].replace(str(hidden.pk + 1000), "N")
        people.user("ada", theirs, Role.VIEWER)
        assert ada.post(path, starting(hidden.pk)).status_code in (200, 201)

    def test_a_token_of_one_project_reaches_no_run_of_another(self, as_user: Speak) -> None:
        theirs = Project.objects.create(name="theirs")
        ada = people.ada()
        people.user("ada", theirs, Role.EDITOR)
        source = saved(people.queued(), 10)
        bound = APIClient(raise_request_exception=False)
        secret = issue(user=ada, name="bound", scopes=("write",), project=theirs).secret
        bound.credentials(HTTP_AUTHORIZATION=f"Bearer {secret}")
        assert errors(bound.post(RUNS, starting(source.pk) | {"project": "theirs"}))[0][0] == "/spec/start/run"
        assert as_user(ada).post(RUNS, starting(source.pk) | {"project": "theirs"}).status_code == 201

    def test_needs_a_checkpoint(self, ada: APIClient) -> None:
        source = people.queued()
        assert "has no checkpoint" in errors(ada.post(RUNS, starting(source.pk)))[0][1]
        saved(source, 10, deleted=True)
        assert "has no checkpoint" in errors(ada.post(RUNS, starting(source.pk)))[0][1]
        saved(source, 20, 40)
        assert errors(ada.post(RUNS, starting(source.pk, step=10))) == [
            ("/spec/start/step", f"step: run {source.pk} has no checkpoint of step 10, only of 40, 20")
        ]
        outside = saved(Run.objects.create(project=Project.default(), owner=people.ada(), name="outside", recorded=True, state="succeeded"), 5)
        assert "has no checkpoint" in errors(ada.post(RUNS, starting(outside.pk)))[0][1]

    def test_must_fit(self, ada: APIClient) -> None:
        source = saved(people.queued(), 10)
        wider = {**people.TINY, "model": {**people.TINY["model"], "d_model": 64}}
        pointer, detail = errors(ada.post(RUNS, starting(source.pk, spec=wider)))[0]
        assert (pointer, detail) == ("/spec/model/d_model", f"d_model: 64, but run {source.pk} has model.d_model 32")
        upcycled = errors(ada.post(RUNS, starting(source.pk, "upcycle")))
        assert upcycled[0][0] == "/spec/start/run" and "MoE layers" in upcycled[0][1]
        Run.objects.filter(pk=source.pk).update(spec={"model": {"colour": 1}})
        assert "another version" in errors(ada.post(RUNS, starting(source.pk)))[0][1]

    def test_of_a_dense_run_is_upcycled(self, ada: APIClient) -> None:
        source = saved(people.queued(model=DENSE["model"]), 10)
        assert ada.post(RUNS, starting(source.pk, "upcycle")).status_code == 201
        narrow = {**people.TINY, "model": {**people.TINY["model"], "moe": {"n_experts": 4, "top_k": 2, "d_expert": 24}}}
        assert errors(ada.post(RUNS, starting(source.pk, "upcycle", spec=narrow)))[0][0] == "/spec/model/moe/d_expert"

    def test_is_looked_at_again_by_clone_and_restart(self, ada: APIClient, as_user: Speak) -> None:
        source = saved(people.queued(), 10)
        made = ada.post(RUNS, starting(source.pk)).json()["id"]
        Run.objects.filter(pk=made).update(state="succeeded")
        assert ada.post(f"{RUNS}/{made}/restart").status_code == 202
        assert ada.post(f"{RUNS}/{made}/clone", {}).json()["parent"] == made
        theirs = Project.objects.create(name="theirs")
        Run.objects.filter(pk=source.pk).update(project=theirs)
        for verb in ("restart", "clone"):
            assert errors(ada.post(f"{RUNS}/{made}/{verb}", {}))[0][1].startswith("run: there is no run")

    def test_at_a_path_is_left_to_the_worker(self, ada: APIClient) -> None:
        for start in ({"kind": "checkpoint", "path": "/weights/a"}, {"kind": "huggingface", "path": "/weights/b"}):
            assert ada.post(RUNS, {"spec": {**people.TINY, "start": start}}).status_code == 201

    def test_is_handed_to_the_host_that_holds_it_while_that_is_alive(self, ada: APIClient) -> None:
        here, there = people.worker("here"), people.worker("there")
        source = saved(people.queued(), 10)
        Run.objects.filter(pk=source.pk).update(worker=there, state="succeeded")
        made = ada.post(RUNS, starting(source.pk)).json()["id"]
        assert claim(Run.objects.all(), worker=here, free_slots=1, free_devices=["cpu:0"]) is None
        other = people.queued()
        taken = claim(Run.objects.all(), worker=here, free_slots=1, free_devices=["cpu:0"])
        assert taken is not None and taken.run.pk == other.pk
        taken = claim(Run.objects.all(), worker=there, free_slots=1, free_devices=["cpu:0"])
        assert taken is not None and taken.run.pk == made
        Run.objects.filter(pk=made).update(state="queued", worker=None)
        Run.objects.filter(pk=other.pk).update(state="succeeded")
        type(there).objects.filter(pk=there.pk).update(last_seen=timezone.now() - timedelta(minutes=5))
        taken = claim(Run.objects.all(), worker=here, free_slots=1, free_devices=["cpu:0"])
        assert taken is not None and taken.run.pk == made  # which then says that the weights are not there


@pytest.mark.django_db
class TestTheDenseBaseline:
    @pytest.mark.parametrize("equal", ["flops", "params"])
    def test_comes_with_both_prices(self, ada: APIClient, equal: Any) -> None:
        answer = ada.post(BASELINE, {"spec": people.TINY, "equal": equal})
        spec = ExperimentSpec.model_validate(people.TINY)
        dense = dense_baseline(spec, equal)
        assert answer.status_code == 200
        assert answer.json() == {
            "spec": dense.model_dump(mode="json"),
            "price": price(dense).model_dump(),
            "compared_with": price(spec).model_dump(),
        }
        assert ada.post("/api/v1/runs", {"spec": answer.json()["spec"]}).status_code == 201

    def test_of_a_preset_with_changes(self, ada: APIClient) -> None:
        answer = ada.post(BASELINE, {"preset": "nano-mixtral", "overrides": {"model.moe.top_k": 1}})
        assert answer.json()["spec"]["model"]["moe"] is None and answer.json()["spec"]["name"] == "nano-mixtral, dense"

    @pytest.mark.parametrize(
        ("body", "pointer"),
        [({"spec": DENSE}, "/spec/model/moe"), ({"spec": {}, "equal": "time"}, "/equal"), ({}, ""), ({"spec": {"colour": 1}}, "/spec/colour")],
    )
    def test_that_cannot_be_is_refused(self, ada: APIClient, body: dict[str, Any], pointer: str) -> None:
        assert errors(ada.post(BASELINE, body))[0][0] == pointer

    def test_is_for_those_who_have_signed_in(self, db: None) -> None:
        assert APIClient().post(BASELINE, {"spec": people.TINY}).status_code == 401
