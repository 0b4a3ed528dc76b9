"""Checkpoints in a storage that hosts share: who may take a run because of them, and whose word on them counts."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from rest_framework.test import APIClient

from experiments.actions import attempt as engine
from experiments.actions.attempt import IngestGrant, end_attempt, record_checkpoint, start_attempt
from experiments.actions.now import after_now
from experiments.actions.source import FETCH_AGAIN_S, UNREACHABLE
from experiments.actions.stored import folder, handed_out
from experiments.actions.token import issue
from experiments.ingest.session import Session
from experiments.models import Checkpoint, Project, Run, State, Worker
from experiments.models.telemetry import SpoolCursor
from experiments.telemetry.frame import FrameError
from spec.events import CheckpointSaved, RunEnded, RunStarted
from tests.experiments.engine import people
from tests.experiments.engine.conftest import Speak
from tests.experiments.engine.pairs import ask, pair
from tests.experiments.telemetry.conftest import events_frame

GPUS = ["cuda:0", "cuda:1"]
URL = "file:///shared/checkpoints"


def sharing(name: str, storage: str = URL, **fields: Any) -> Worker:
    worker = people.worker(name, **fields)
    Worker.objects.filter(pk=worker.pk).update(storage=storage)
    worker.refresh_from_db()
    return worker


def gone(worker: Worker) -> None:
    Worker.objects.filter(pk=worker.pk).update(last_seen=timezone.now() - timedelta(minutes=5))


def has_rested(run: Run) -> None:
    Run.objects.filter(pk=run.pk).update(updated_at=after_now(-3600))


def saves(run: Run, step: int, attempt: int = 1) -> Checkpoint:
    record_checkpoint(run.pk, attempt, CheckpointSaved(step=step, at=1.0, path=f"/c/{step}", size_bytes=1, sha256=f"{attempt}:{step}", seconds=1.0))
    return Checkpoint.objects.get(run=run, attempt=attempt, step=step)


def session(run: Run, attempt: int = 1) -> Session:
    return Session(IngestGrant(run.pk, attempt, is_recorder=False))


def stored(run: Run, *pairs: tuple[int, int], attempt: int = 1, problem: dict[str, Any] | None = None, storage: str = URL) -> None:
    """The attempt's supervisor says that these (attempt, step) are in the storage."""
    checkpoints = [{"attempt": number, "step": step, "sha256": f"{number}:{step}"} for number, step in pairs]
    session(run, attempt).text(json.dumps({"type": "stored", "storage": storage, "checkpoints": checkpoints, "problem": problem}))


def begun(worker: Worker, **fields: Any) -> Run:
    """A run on `worker`, attempt 1."""
    run = people.queued(**fields)
    claimed = ask(worker)
    assert claimed and claimed.run.pk == run.pk
    return Run.objects.get(pk=run.pk)


def begins_from(first: Run) -> Run:
    """A queued run whose spec starts from step 20 of `first`."""
    run = people.queued()
    Run.objects.filter(pk=run.pk).update(spec={**run.spec, "start": {"kind": "checkpoint", "run": first.pk, "step": 20}})
    return run


def leaves(run: Run, reason: str = "worker_stopped") -> None:
    end_attempt(run.pk, Run.objects.get(pk=run.pk).attempt, RunEnded(at=1.0, outcome="paused", reason=reason))


@pytest.mark.django_db
class TestWhoMayTakeIt:
    def test_those_with_the_storage_as_well_as_the_home_and_nobody_else_while_one_of_them_lives(self) -> None:
        home, shares, other = sharing("home"), sharing("shares"), sharing("other", "file:///elsewhere")
        run = begun(home)
        saves(run, 10)
        stored(run, (1, 10))
        leaves(run)
        assert ask(other) is None and ask(people.worker("none")) is None
        gone(home)
        assert ask(other) is None, "there is one that can fetch it"
        assert ask(shares).run == run  # type: ignore[union-attr]
        leaves(run)
        gone(shares)
        assert ask(other).run == run, "nobody can: it begins anew"  # type: ignore[union-attr]

    def test_the_home_alone_has_the_newest_until_it_is_stored_and_an_older_one_is_for_when_it_is_gone(self) -> None:
        home, shares, other = sharing("home"), sharing("shares"), people.worker("other")
        run = begun(home)
        saves(run, 10), saves(run, 20)
        stored(run, (1, 10))
        leaves(run)
        assert ask(shares) is None
        gone(home)
        assert ask(other) is None
        assert ask(shares).run == run  # type: ignore[union-attr]
        told = handed_out(run, shares)
        assert [(one["step"], one["place"]) for one in told["checkpoints"]] == [(20, None), (10, f"{folder(run)}/attempt-1/step-00000010")]
        assert (told["stored_as"], told["trained"], told["start"]) == (folder(run), 0, None)

    def test_after_a_fetch_that_failed_the_home_comes_first_and_no_try_is_counted(self) -> None:
        home, shares = sharing("home"), sharing("shares")
        run = begun(home)
        saves(run, 10)
        stored(run, (1, 10))
        leaves(run)
        assert ask(shares).run == run  # type: ignore[union-attr]
        leaves(run, UNREACHABLE)
        found = Run.objects.get(pk=run.pk)
        assert (found.state, found.attempts_without_progress, found.attempts_not_taken) == (State.QUEUED, 0, 1)
        has_rested(run)
        assert ask(shares) is None
        gone(home)
        assert ask(shares).run == run, "there is no other way"  # type: ignore[union-attr]

    def test_after_the_homes_own_fetch_has_failed_any_may_try_again(self) -> None:
        home, shares = sharing("home"), sharing("shares")
        run = begun(home)
        saves(run, 10)
        stored(run, (1, 10))
        leaves(run, UNREACHABLE)
        assert ask(home) is None and ask(shares) is None, "not at once"
        has_rested(run)
        assert ask(shares).run == run  # type: ignore[union-attr]

    def test_a_checkpoint_that_nobody_can_fetch_is_tried_ten_times_ever_more_seldom(self) -> None:
        home, shares = sharing("home"), sharing("shares")
        run = begun(home)
        saves(run, 10)
        stored(run, (1, 10))
        leaves(run)
        gone(home)
        for tries in range(1, 11):
            assert ask(shares).run == run  # type: ignore[union-attr]
            leaves(run, UNREACHABLE)
            wait_s = FETCH_AGAIN_S * 2 ** (tries - 1)
            Run.objects.filter(pk=run.pk).update(updated_at=after_now(1 - wait_s))
            assert ask(shares) is None
            Run.objects.filter(pk=run.pk).update(updated_at=after_now(-wait_s))
        found = Run.objects.get(pk=run.pk)
        assert (found.state, found.reason, found.attempts_without_progress) == (State.FAILED, "restart_limit", 0)
        assert found.detail.startswith("10 attempts in which a host could not fetch the checkpoint; the last ended with checkpoint_unreachable.")
        assert "resume_from" in found.detail

    def test_the_home_does_not_rest_after_a_fetch_of_others_and_a_start_forgets_them(self) -> None:
        home, shares = sharing("home"), sharing("shares")
        run = begun(home)
        saves(run, 10)
        stored(run, (1, 10))
        leaves(run)
        assert ask(shares)
        leaves(run, UNREACHABLE)
        assert ask(home).run == run  # type: ignore[union-attr]
        start_attempt(run.pk, 3, RunStarted(attempt=3, at=1.0, resumed_from_step=10))
        assert Run.objects.get(pk=run.pk).attempts_not_taken == 0

    @pytest.mark.parametrize("lacks", ["token", "device"])
    def test_only_those_are_waited_for_that_may_have_the_run_and_have_room_for_it(self, lacks: str) -> None:
        home, other = people.worker("home", cuda=2), people.worker("other", cuda=2)
        run = people.queued(parallel={"data": 2, "device": "cuda"})
        Run.objects.filter(pk=run.pk).update(worker=home, progress_checkpoint_step=10)
        assert ask(other, GPUS) is None
        if lacks == "token":
            Worker.objects.filter(pk=home.pk).update(token=issue(user=people.user("olga"), name="hers", scopes=["worker"]).token)
        else:
            Worker.objects.filter(pk=home.pk).update(devices=home.devices[:2])
        with CaptureQueriesContext(connection) as queries:
            assert ask(other, GPUS).run == run  # type: ignore[union-attr]
        assert len(queries) < 35

    @pytest.mark.parametrize("how", ["start", "resume_from"])
    def test_a_run_that_begins_from_a_stored_checkpoint_of_another(self, how: str) -> None:
        home, shares, other = sharing("home"), sharing("shares"), people.worker("other")
        first = begun(home)
        saves(first, 20)
        stored(first, (1, 20))
        run = begins_from(first) if how == "start" else people.queued()
        if how == "resume_from":
            Run.objects.filter(pk=run.pk).update(resume_from={"run": first.pk, "step": 20, "path": "/c/20", "host": "home"})
        assert ask(other) is None
        claimed = ask(shares)
        assert claimed and claimed.run == run
        told = handed_out(claimed.run, shares)
        known = {"run": first.pk, "step": 20, "sha256": "1:20", "place": f"{folder(first)}/attempt-1/step-00000020"}
        assert told[how].items() >= known.items() and told["start" if how == "resume_from" else "resume_from"] is None
        assert handed_out(claimed.run, other)[how]["place"] is None

    def test_of_several_hosts_one_that_can_bring_it_becomes_node_0(self) -> None:
        home, plain, shares = sharing("home"), people.worker("plain"), sharing("shares")
        run = pair()
        Run.objects.filter(pk=run.pk).update(worker=home, progress_checkpoint_step=10)
        row = run.checkpoints.create(attempt=1, step=10, path="", size_bytes=1, sha256="1:10", seconds=1, at=run.created_at, host="home", storage=URL)
        gone(home)
        assert ask(plain) is None
        last = ask(shares)
        assert last and (last.run, last.node) == (run, 0) and ask(plain).node == 1  # type: ignore[union-attr]
        assert handed_out(run, shares)["checkpoints"][0]["place"].endswith("attempt-1/step-00000010") and row.storage == URL

    def test_hosts_that_cannot_bring_it_do_not_begin_while_one_lives_that_can(self) -> None:
        home, shares = sharing("home"), sharing("shares")
        begun(shares)  # it is busy
        plain = [people.worker(name) for name in ("a", "b")]
        run = pair()
        Run.objects.filter(pk=run.pk).update(worker=home, progress_checkpoint_step=10)
        run.checkpoints.create(attempt=1, step=10, path="", size_bytes=1, sha256="", seconds=1, at=run.created_at, host="home", storage=URL)
        gone(home)
        assert [ask(worker) for worker in plain] == [None, None]
        gone(shares)
        assert [bool(ask(worker)) for worker in plain] == [False, True]


@pytest.mark.django_db
class TestWhatIsSaid:
    def test_a_word_tells_all_and_one_that_comes_before_its_checkpoint_is_remembered(self, ada: APIClient) -> None:
        run = begun(sharing("home"))
        saves(run, 10), saves(run, 20)
        stored(run, (1, 10), (1, 20), (1, 30))
        stored(run, (1, 20), problem={"step": 30, "detail": "it is full"})
        saves(run, 30)
        stored(run, (1, 20), problem={"step": 30, "detail": "it is full"})
        shown = {
            one["step"]: (one["host"], one["stored_at"], one["storage_problem"])
            for one in ada.get(f"/api/v1/runs/{run.pk}/checkpoints").json()["items"]
        }
        there = f"{URL}/{folder(run)}/attempt-1/step-00000020"
        assert shown == {10: ("home", "", ""), 20: ("home", there, ""), 30: ("home", "", "it is full")}
        stored(run, (1, 30))
        assert list(run.checkpoints.order_by("step").values_list("storage", "storage_problem")) == [("", ""), ("", ""), (URL, "")]

    def test_one_frame_that_brings_the_checkpoint_and_the_end_loses_no_word(self) -> None:
        run = begun(sharing("home"))
        speaker = session(run)
        speaker.hello()
        checkpoints = [{"attempt": 1, "step": 10, "sha256": "1:10"}]
        speaker.text(json.dumps({"type": "stored", "storage": URL, "checkpoints": checkpoints, "problem": None}))
        saved = CheckpointSaved(step=10, at=1.0, path="/c/10", size_bytes=1, sha256="1:10", seconds=1.0)
        end = RunEnded(at=1.0, outcome="paused", reason="worker_stopped")
        really, seen = engine.end_attempt, []

        def ends(*args: Any) -> None:
            seen.append(Checkpoint.objects.get(run=run).storage)
            really(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "end_attempt", ends)
            speaker.binary(events_frame(1, [saved, end]))
        assert seen == [URL], "before anybody can claim it"
        assert Run.objects.get(pk=run.pk).state == State.QUEUED

    def test_another_manifest_of_that_step_is_not_it(self) -> None:
        run = begun(sharing("home"))
        saves(run, 10)
        Checkpoint.objects.filter(run=run).update(sha256="another")
        stored(run, (1, 10))
        assert Checkpoint.objects.get(run=run).storage == ""

    def test_a_fenced_attempt_has_no_say(self) -> None:
        run = begun(sharing("home"))
        saves(run, 10)
        Run.objects.filter(pk=run.pk).update(attempt=2)
        from experiments.actions.stored import InStorage, record_stored

        record_stored(run.pk, 1, InStorage.model_validate({"storage": URL, "checkpoints": [{"attempt": 1, "step": 10, "sha256": "1:10"}]}))
        assert Checkpoint.objects.get(run=run).storage == ""

    def test_one_that_is_damaged_is_not_offered_again_but_only_by_who_needs_it(self) -> None:
        home = sharing("home", slots=3)
        first, stranger = begun(home), begun(home)
        saves(first, 20)
        run = begins_from(first)
        stored(first, (1, 20))
        assert ask(home).run == run  # type: ignore[union-attr]
        word = json.dumps({"type": "damaged", "storage": URL, "place": f"{folder(first)}/attempt-1/step-00000020", "detail": "model.bin"})
        session(stranger).text(word)
        assert Checkpoint.objects.get(run=first).storage == URL
        Run.objects.filter(pk=first.pk).update(project=Project.objects.create(name="others"))  # which Ada does not edit
        session(run).text(word)
        assert Checkpoint.objects.get(run=first).storage == URL
        Run.objects.filter(pk=first.pk).update(project=Project.default())
        session(run).text(word)
        assert (Checkpoint.objects.get(run=first).storage, Checkpoint.objects.get(run=first).storage_problem) == ("", "model.bin")

    @pytest.mark.parametrize(
        "word",
        [
            {"type": "stored", "storage": "s3://me:SECRET@b", "checkpoints": []},
            {"type": "stored", "storage": "", "checkpoints": []},
            {"type": "stored", "storage": URL, "checkpoints": [{"attempt": 1, "step": -1, "sha256": ""}]},
            {"type": "damaged", "storage": URL, "place": "../../etc", "detail": ""},
        ],
    )
    def test_nonsense_is_refused_by_its_field_and_no_secret_is_repeated(self, word: dict[str, Any]) -> None:
        with pytest.raises(FrameError, match=rf"^{word['type']}\.") as refused:
            session(begun(sharing("home"))).text(json.dumps(word))
        assert "SECRET" not in str(refused.value)

    def test_hello_refuses_a_password_without_repeating_it_and_keeps_one_spelling(self, as_user: Speak) -> None:
        host = as_user(None, "worker")
        hello = {"name": "gpu1", "host": "gpu1", "pid": 1, "version": "0", "devices": [], "slots": 1}
        bad = host.post("/api/v1/worker/hello", {**hello, "storage": "s3://me:SECRET@bucket/a"})
        assert bad.status_code == 422 and "SECRET" not in bad.content.decode()
        assert bad.json()["errors"][0]["pointer"] == "/storage" and "must have no password" in bad.json()["errors"][0]["detail"]
        assert host.post("/api/v1/worker/hello", {**hello, "storage": "s3a://bucket//a/"}).status_code == 200
        assert Worker.objects.get(name="gpu1").storage == "s3://bucket/a"
        assert host.post("/api/v1/worker/hello", hello).status_code == 200 and Worker.objects.get(name="gpu1").storage == ""

    def test_the_page_says_where_each_is_and_trusts_no_words(self, client: Client) -> None:
        run = begun(sharing("home"))
        saves(run, 10), saves(run, 20)
        stored(run, (1, 10), problem={"step": 20, "detail": "<b>it is full</b>"})
        client.force_login(people.ada())
        page = client.get(f"/runs/{run.pk}/panel/checkpoints").content.decode()
        newest, older = page.split('<tr class="row">')[1:]
        assert "home:" in newest and "on this host only: &lt;b&gt;it is full&lt;/b&gt;" in newest
        assert f"{URL}/{folder(run)}/attempt-1/step-00000010" in older and "only" not in older


@pytest.mark.django_db
class TestAPastThatTheRunHasLeft:
    def test_its_checkpoints_count_no_more_whenever_they_are_told_of(self) -> None:
        home = sharing("home")
        run = begun(home)
        saves(run, 10), saves(run, 30)
        stored(run, (1, 10), (1, 30))
        leaves(run)
        assert ask(home)
        SpoolCursor.objects.create(run_id=run.pk, attempt=2, started=True, resumed_from_step=10)
        start_attempt(run.pk, 2, RunStarted(attempt=2, at=1.0, resumed_from_step=10))
        saves(run, 40)  # attempt 1's, shipped late
        saves(run, 20, attempt=2)
        rows = {(row.attempt, row.step): (row.deleted, row.storage) for row in Checkpoint.objects.filter(run=run)}
        assert rows == {(1, 10): (False, URL), (1, 30): (True, ""), (1, 40): (True, ""), (2, 20): (False, "")}
        told = handed_out(run, home)
        assert [(one["attempt"], one["step"]) for one in told["checkpoints"]] == [(2, 20), (1, 10)] and told["trained"] == 2
        stored(run, (1, 10), (1, 30), (2, 20), attempt=2)  # its copy is still there
        assert dict(Checkpoint.objects.filter(run=run).values_list("step", "storage")) == {10: URL, 20: URL, 30: "", 40: ""}
