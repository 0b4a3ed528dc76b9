"""Runs on several hosts: all of them get it at once or nobody does, nobody waits for ever, and each host speaks for itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from rest_framework.test import APIClient

from experiments import doorbell
from experiments.access import Principal, projects_of_workers, visible_runs
from experiments.actions import gather
from experiments.actions.attempt import MAX_ATTEMPTS_NOT_TAKEN, authenticate_ingest, end_attempt, renew_lease, start_attempt
from experiments.actions.cancel import cancel
from experiments.actions.claim import Claim, claim
from experiments.actions.gather import GATHER_S, PATIENCE_S
from experiments.actions.node import Hosts, announce, hosts_of, leave_node, renew_node
from experiments.actions.now import after_now
from experiments.actions.resume import resume
from experiments.actions.token import issue
from experiments.models import Node, Presence, Project, Role, Run, State, Token, Transition, Worker
from experiments.reconcile import reconcile_once
from spec.events import RunEnded, RunStarted
from tests.experiments.engine import people
from tests.experiments.engine.conftest import Speak

PAIR = {"data": 2, "nodes": 2}


def ask(worker: Worker, devices: list[str] | None = None) -> Claim | None:
    return claim(Run.objects.all(), worker=worker, free_slots=worker.slots, free_devices=["cpu:0"] if devices is None else devices)


def pair(**fields: Any) -> Run:
    return people.queued(parallel=PAIR, **fields)


def state(run: Run) -> str:
    return Run.objects.get(pk=run.pk).state


def places_are_over() -> None:
    Node.objects.filter(attempt=0).update(lease_until=after_now(-1))


def has_waited(run: Run) -> None:
    Transition.objects.filter(run=run).update(at=after_now(-PATIENCE_S - 1))


@pytest.fixture
def rung(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The queues that are rung after the commit."""
    queues: list[str] = []

    def at_once(function: Callable[..., bool], *arguments: Any) -> Future[bool]:
        done: Future[bool] = Future()
        done.set_result(function(*arguments))
        return done

    monkeypatch.setattr(doorbell, "ring", lambda queue=doorbell.QUEUE: queues.append(queue) or True)
    monkeypatch.setattr(doorbell._ringer, "submit", at_once)
    return queues


def granted(*workers: Worker) -> tuple[Run, list[Claim]]:
    """A pair's run on the workers, in the order of their asking, and what each of them got."""
    run = pair()
    first, second = workers
    assert ask(first) is None
    last = ask(second)
    earlier = ask(first)
    assert earlier and last
    return run, [earlier, last]


@pytest.mark.django_db
class TestGathering:
    def test_the_last_host_grants_the_run_to_all_with_one_attempt(self) -> None:
        one, two = people.worker("one"), people.worker("two")
        run = pair()
        assert ask(one) is None
        assert state(run) == State.QUEUED, "half a run is not started"
        last = ask(two)
        assert last and (last.run.pk, last.node, last.devices, last.run.attempt) == (run.pk, 1, ["cpu:0"], 1)
        first = ask(one)
        assert first and (first.run.pk, first.node, first.devices, first.run.attempt) == (run.pk, 0, ["cpu:0"], 1)
        found = Run.objects.get(pk=run.pk)
        assert (found.state, found.attempt, found.worker, found.devices) == (State.STARTING, 1, one, ["cpu:0"])
        assert ask(one) is None and ask(two) is None, "nobody gets it twice"
        assert authenticate_ingest(run.pk, 1, first.token) and not authenticate_ingest(run.pk, 1, last.token)
        assert authenticate_ingest(run.pk, 1, last.token, node=1) and not authenticate_ingest(run.pk, 1, first.token, node=1)

    def test_ranks_are_divided_evenly_and_all_hosts_take_the_same_kind(self) -> None:
        run = people.queued(parallel={"data": 2, "expert": 2, "nodes": 2}, training={"steps": 20, "batch_size": 4})
        gpu, cpu, other_gpu = people.worker("gpu", cuda=2), people.worker("cpu"), people.worker("gpu2", cuda=2)
        assert ask(gpu, ["cpu:0", "cuda:0", "cuda:1"]) is None
        assert ask(cpu) is None
        last = ask(other_gpu, ["cpu:0", "cuda:0", "cuda:1"])
        assert last and (last.run.pk, last.devices) == (run.pk, ["cuda:0", "cuda:1"])

    def test_one_worker_is_never_two_hosts_of_a_run(self) -> None:
        run, big = pair(), people.worker("big", slots=4)
        people.worker("other")
        assert [ask(big) for _ in range(3)] == [None] * 3
        assert state(run) == State.QUEUED and Node.objects.filter(run=run).count() == 1

    def test_the_others_are_rung_and_then_those_that_wait(self, rung: list[str], django_capture_on_commit_callbacks: Any) -> None:
        one, two = people.worker("one", host="h1"), people.worker("two", host="h2")
        with django_capture_on_commit_callbacks(execute=True):
            pair()
        rung.clear()
        with django_capture_on_commit_callbacks(execute=True):
            ask(one)
        assert rung == ["workers.look_for_work.two@h2"]
        rung.clear()
        with django_capture_on_commit_callbacks(execute=True):
            ask(two)
        assert rung == ["workers.look_for_work.one@h1"]

    def test_a_place_holds_its_devices_for_a_short_time_by_the_databases_clock(self) -> None:
        run, one = pair(), people.worker("one")
        people.worker("two")
        single = people.queued()
        assert ask(one) is None
        with connection.cursor() as cursor:
            cursor.execute("SELECT extract(epoch FROM lease_until - clock_timestamp()) FROM experiments_node WHERE run_id = %s", [run.pk])
            assert GATHER_S - 2 < cursor.fetchone()[0] <= GATHER_S
        assert ask(one) is None, "its only slot is kept"
        cancel(run.pk, by="user:ada")
        taken = ask(one)
        assert taken and taken.run == single

    def test_a_gathering_that_was_not_completed_begins_anew_for_all_at_once(self) -> None:
        run = people.queued(parallel={"data": 3, "nodes": 3}, training={"steps": 20, "batch_size": 3})
        one, two, three = (people.worker(name) for name in ("one", "two", "three"))
        assert ask(one) is None and ask(two) is None
        ends = set(Node.objects.filter(run=run).values_list("lease_until", flat=True))
        assert len(ends) == 1, "they are let go together"
        places_are_over()
        assert ask(three) is None, "two places that are over and this one are not three"
        assert ask(one) is None
        last = ask(two)
        assert last and last.node == 2
        assert [ask(worker).node for worker in (three, one)] == [0, 1]  # type: ignore[union-attr]

    def test_a_run_whose_hosts_cannot_be_had_keeps_nobody_waiting(self) -> None:
        pair()
        single = people.queued()
        lonely = people.worker("lonely")
        silent = people.worker("silent")
        Worker.objects.filter(pk=silent.pk).update(last_seen=after_now(-300))
        people.worker("full", slots=0)
        taken = ask(lonely)
        assert taken and taken.run == single


@pytest.mark.django_db
class TestNobodyWaitsForEver:
    def test_two_runs_for_two_hosts_do_not_wait_for_each_other(self) -> None:
        runs = [pair(), pair()]
        workers = [people.worker("one"), people.worker("two")]
        claims = [ask(worker) for worker in (*workers, *workers)]
        got = {found.run.pk for found in claims if found}
        assert got == {runs[0].pk} and state(runs[1]) == State.QUEUED
        Run.objects.filter(pk=runs[0].pk).update(state=State.SUCCEEDED)
        claims = [ask(worker) for worker in (*reversed(workers), *workers)]
        assert {found.run.pk for found in claims if found} == {runs[1].pk}

    def test_two_runs_that_are_half_gathered_by_different_hosts_are_let_go_and_one_is_made(self) -> None:
        """The urgent run came when the other one had a place already: each has one of the two hosts, neither can be completed."""
        one, two = people.worker("one"), people.worker("two")
        plain = pair()
        assert ask(one) is None
        urgent = pair(priority=5)
        has_waited(urgent)
        assert ask(two) is None
        assert set(Node.objects.values_list("run", "worker")) == {(plain.pk, one.pk), (urgent.pk, two.pk)}
        assert [ask(one), ask(two)] == [None, None], "both hosts are kept"
        places_are_over()
        assert ask(one) is None
        assert [ask(two).run, ask(one).run] == [urgent, urgent]  # type: ignore[union-attr]
        assert state(plain) == State.QUEUED

    def test_short_runs_pass_while_a_host_is_busy_but_not_for_ever(self) -> None:
        one, two = people.worker("one"), people.worker("two")
        long = people.queued()
        assert ask(two)
        wide, short, shorter = pair(), people.queued(), people.queued()
        taken = ask(one)
        assert taken and taken.run == short, "two is busy: one need not wait"
        Run.objects.filter(pk=short.pk).update(state=State.SUCCEEDED)
        has_waited(wide)
        assert ask(one) is None and state(shorter) == State.QUEUED, "it keeps itself for the run that has waited"
        places_are_over()
        assert ask(one) is None and state(shorter) == State.QUEUED, "and does so again"
        Run.objects.filter(pk=long.pk).update(state=State.SUCCEEDED)
        assert ask(two).run == wide  # type: ignore[union-attr]
        assert ask(one).run == wide  # type: ignore[union-attr]

    def test_a_run_that_has_waited_does_not_keep_hosts_that_could_never_be_enough(self) -> None:
        wide, short = pair(), people.queued()
        has_waited(wide)
        taken = ask(people.worker("alone"))
        assert taken and taken.run == short


@pytest.mark.django_db
class TestTheCheckpointsHost:
    def test_it_becomes_node_0_whoever_asks_first(self) -> None:
        run, home, other = pair(), people.worker("home"), people.worker("other")
        Run.objects.filter(pk=run.pk).update(worker=home, progress_checkpoint_step=10)
        assert ask(other) is None
        claimed = ask(home)
        assert claimed and claimed.node == 0 and Run.objects.get(pk=run.pk).worker == home
        assert ask(other).node == 1  # type: ignore[union-attr]

    def test_of_two_workers_on_that_host_the_one_that_saved_it(self) -> None:
        run, other, home = pair(), people.worker("other", host="h"), people.worker("home", host="h")
        Run.objects.filter(pk=run.pk).update(worker=home, progress_checkpoint_step=10)
        assert ask(other) is None
        claimed = ask(home)
        assert claimed and claimed.node == 0

    def test_no_others_make_the_run_while_it_lives_but_they_do_when_it_is_gone(self) -> None:
        run, home = pair(), people.worker("home")
        two_others = [people.worker(name) for name in ("a", "b")]
        Run.objects.filter(pk=run.pk).update(worker=home, progress_checkpoint_step=10)
        assert [ask(worker) for worker in two_others] == [None, None]
        assert state(run) == State.QUEUED
        Worker.objects.filter(pk=home.pk).update(last_seen=after_now(-300))
        places_are_over()
        claims = [ask(worker) for worker in (*two_others, two_others[0])]
        assert sorted(found.node for found in claims if found) == [0, 1]

    def test_the_host_of_the_run_that_it_starts_from_comes_first_too(self) -> None:
        here, there = people.worker("here"), people.worker("there")
        run = pair()
        Run.objects.filter(pk=run.pk).update(resume_from={"run": 1, "step": 40, "path": "/c/40", "host": "there"})
        assert ask(here) is None
        assert ask(there).node == 0  # type: ignore[union-attr]


@pytest.mark.django_db
class TestWhoMayBeAHost:
    """Ada's pair is in the default project; `one` may take it. What the other worker's token may see decides."""

    @staticmethod
    def token(user: User, scopes: list[str] | None = None, **fields: Any) -> Token:
        return issue(user=user, name="other", scopes=scopes or ["worker"], **fields).token

    def stays_alone(self, other: Token | None) -> bool:
        """Whether a worker that could wait with another for a pair takes a short run instead, though the pair has waited for long."""
        one, two = people.worker("one"), people.worker("two")
        Worker.objects.filter(pk=two.pk).update(token=other)
        wide, short = pair(), people.queued()
        has_waited(wide)
        found = ask(one)
        assert (found is None) == Node.objects.filter(run=wide).exists()
        return found is not None and found.run == short

    def test_a_worker_whose_token_sees_the_run(self) -> None:
        assert not self.stays_alone(self.token(people.user("ben", Project.default(), Role.EDITOR)))

    def test_a_worker_of_the_machines_owner(self) -> None:
        assert not self.stays_alone(self.token(people.user("root", is_superuser=True)))

    def test_one_who_only_views_or_is_outside(self) -> None:
        assert self.stays_alone(self.token(people.user("vic", Project.default(), Role.VIEWER)))

    def test_one_outside(self) -> None:
        assert self.stays_alone(self.token(people.user("olga")))

    def test_one_bound_to_another_project(self) -> None:
        assert self.stays_alone(self.token(people.user("root", is_superuser=True), project=Project.objects.create(name="other")))

    def test_one_whose_token_is_revoked_or_was_never_heard(self) -> None:
        token = self.token(people.ada())
        Token.objects.filter(pk=token.pk).update(revoked_at=after_now(-1))
        assert self.stays_alone(token)

    def test_one_that_has_not_spoken_since_tokens_are_remembered(self) -> None:
        assert self.stays_alone(None)

    def test_one_whose_token_may_do_anything_but_work(self) -> None:
        assert self.stays_alone(self.token(people.ada(), ["admin"]))

    def test_the_books_say_what_the_claim_would(self) -> None:
        """For every kind of token: the projects that the books know are those of which the claim's own query offers runs."""
        other = Project.objects.create(name="other")
        ada, root = people.user("ada", other, Role.VIEWER), people.user("root", is_superuser=True)
        people.user("ada", Project.default(), Role.EDITOR)
        runs = {project.pk: Run.objects.create(project=project, owner=ada, name="x") for project in (Project.default(), other)}
        tokens = [self.token(user, project=project) for user in (ada, root) for project in (None, Project.default(), other)]
        known = projects_of_workers([token.pk for token in tokens])
        for token in tokens:
            principal = Principal(token.user, frozenset(token.scopes), token.project_id, token.pk)
            offered = set(visible_runs(principal, Role.EDITOR).values_list("project_id", flat=True))
            assert known[token.pk] == offered and offered <= set(runs)

    def test_a_worker_is_known_by_the_token_with_which_it_spoke_last(self, as_user: Speak) -> None:
        worker = people.worker("one")
        for verb, body in (("hello", HELLO), ("claim", {"worker": worker.pk, "free_slots": 1, "free_devices": ["cpu:0"]})):
            as_user(people.user(f"by {verb}"), "worker").post(f"/api/v1/worker/{verb}", body, format="json")
            worker.refresh_from_db()
            assert worker.token and worker.token.user.username == f"by {verb}"


HELLO = {"name": "one", "host": "one", "pid": 1, "version": "0", "devices": [], "slots": 1}


@pytest.mark.django_db
class TestAQueueOfRunsThatCannotBeHad:
    @pytest.mark.parametrize("count", [3, 30])
    def test_they_hide_neither_a_run_on_several_hosts_nor_one_on_one_and_cost_no_query(self, count: int) -> None:
        one, two = people.worker("one", slots=4), people.worker("two", slots=4)
        busy = people.worker("busy", slots=0)
        many = {"parallel": {"data": 4, "nodes": 4}, "training": {"steps": 20, "batch_size": 4}}
        for index in range(count):
            bound = people.queued(**many) if index % 2 else pair()
            Run.objects.filter(pk=bound.pk).update(worker=busy, progress_checkpoint_step=10)
        wide, short = pair(), people.queued()
        with CaptureQueriesContext(connection) as queries:
            taken = ask(one)
        assert taken and taken.run == short and Node.objects.get().run == wide
        assert len(queries) < 60
        assert ask(two).run == wide  # type: ignore[union-attr]

    def test_runs_that_others_are_gathering_on_another_kind_of_device_do_not_hide_one(self) -> None:
        for index in range(30):
            gpu = people.worker(f"gpu{index}", cuda=1)
            Node.objects.create(run=pair(priority=1), worker=gpu, devices=["cuda:0"], lease_until=after_now(GATHER_S))
        wide = pair()
        people.worker("cpu")
        with CaptureQueriesContext(connection) as queries:
            assert ask(people.worker("another cpu")) is None
        assert Node.objects.filter(run=wide, worker__name="another cpu").exists()
        assert len(queries) < 60


class Asking(threading.Thread):
    """A worker that asks in a transaction of its own; `result()` is what it got, or raises what went wrong."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(daemon=True)
        self._worker, self._done = worker, Future[Claim | None]()
        self.start()

    def run(self) -> None:
        try:
            self._done.set_result(ask(self._worker))
        except Exception as error:
            self._done.set_exception(error)
        finally:
            connection.close()

    def result(self) -> Claim | None:
        return self._done.result(10)

    def waits(self, seconds: float = 0.5) -> bool:
        self.join(seconds)
        return self.is_alive()


@pytest.fixture
def at_join(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What each claim does, in turn, when it has locked the first run on several hosts and is about to join it."""
    stops: list[Callable[[], object]] = []
    join = gather.join

    def stop_first(*arguments: Any) -> None:
        if stops:
            stops.pop(0)()
        join(*arguments)

    monkeypatch.setattr(gather, "join", stop_first)
    return stops


@pytest.mark.django_db(transaction=True)
def test_a_host_that_asks_while_another_joins_waits_for_it_and_takes_nothing_less_urgent(at_join: list[Callable[[], object]]) -> None:
    one, two = people.worker("one"), people.worker("two")
    wide, short = pair(), people.queued()
    joining, go_on = threading.Event(), threading.Event()
    at_join.append(lambda: (joining.set(), go_on.wait(10)))
    first = Asking(one)
    assert joining.wait(10)
    second = Asking(two)
    assert second.waits(), "the run is being gathered at this moment: it is worth a moment"
    go_on.set()
    got = second.result()
    assert first.result() is None and got and (got.run, got.node) == (wide, 1)
    assert state(short) == State.QUEUED


@pytest.mark.django_db(transaction=True)
def test_two_hosts_that_join_two_runs_in_opposite_order_do_not_wait_for_each_other(at_join: list[Callable[[], object]]) -> None:
    one, two = people.worker("one", slots=3), people.worker("two", slots=3)
    people.worker("three", slots=3)
    left, right = (people.queued(parallel={"data": 3, "nodes": 3}, training={"steps": 20, "batch_size": 3}) for _ in range(2))
    both, joining = threading.Barrier(2, timeout=10), threading.Event()
    at_join += [lambda: (joining.set(), both.wait()), both.wait]
    first = Asking(one)
    assert joining.wait(10), "one has locked `left`, and goes on to `right`"
    Run.objects.filter(pk=right.pk).update(priority=5)
    second = Asking(two)
    assert [first.result(), second.result()] == [None, None]
    assert set(Node.objects.values_list("run", "worker")) == {(run.pk, worker.pk) for run in (left, right) for worker in (one, two)}


@pytest.mark.django_db(transaction=True)
def test_hosts_that_ask_at_once_never_share_a_device_and_never_get_half_a_run() -> None:
    runs = [pair() for _ in range(3)] + [people.queued() for _ in range(2)]
    workers = [people.worker(f"w{index}", slots=2) for index in range(4)]
    barrier, got, errors = threading.Barrier(len(workers)), [], []

    def race(worker: Worker) -> None:
        barrier.wait()
        try:
            for _ in range(12):
                if (found := ask(worker)) is not None:
                    got.append((found.run.pk, found.run.attempt, found.node, worker.pk))
        except Exception as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=race, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for run in runs:
        hosts = [(node, worker) for pk, attempt, node, worker in got if pk == run.pk and attempt == 1]
        if Run.objects.get(pk=run.pk).state == State.STARTING:
            assert sorted(node for node, _ in hosts) == list(range(run.node_count))
            assert len({worker for _, worker in hosts}) == run.node_count
        else:
            assert hosts == []
    for worker in workers:
        assert sum(w == worker.pk for *_, w in got) <= 2
    assert len({pk for pk, *_ in got}) >= 4, "eight slots are enough for three pairs and two more; a race may leave one for the next bell"


@pytest.mark.django_db
def test_the_hosts_are_shown_with_the_run_and_the_run_with_each_host(ada: APIClient) -> None:
    one, two = people.worker("one", host="h1"), people.worker("two", host="h2")
    run, _ = granted(one, two)
    shown = ada.get(f"/api/v1/runs/{run.pk}").json()
    assert (shown["node_count"], shown["worker"]) == (2, "one")
    same = {"attempt": 1, "devices": ["cpu:0"], "outcome": "", "reason": "", "detail": "", "left_at": None}
    assert shown["nodes"] == [
        {"rank": 0, "ranks": [0], "worker": "one", "host": "h1", **same},
        {"rank": 1, "ranks": [1], "worker": "two", "host": "h2", **same},
    ]
    workers = {row["name"]: (row["busy"], row["runs"]) for row in ada.get("/api/v1/workers").json()["items"]}
    assert workers == {"one": (1, [run.pk]), "two": (1, [run.pk])}
    alone = people.queued()
    assert ada.get(f"/api/v1/runs/{alone.pk}").json()["nodes"] == []


@pytest.mark.django_db
class TestHowEachHostEnded:
    @pytest.mark.parametrize(("outcome", "other"), [("succeeded", "succeeded"), ("paused", "paused"), ("failed", "stopped")])
    def test_one_that_had_no_word_ended_as_the_attempt_did_or_was_stopped(self, ada: APIClient, outcome: str, other: str) -> None:
        run, _ = granted(people.worker("one"), people.worker("two"))
        end_attempt(run.pk, 1, RunEnded(at=1.0, outcome=outcome, reason="why", detail="what"))
        first, second = ada.get(f"/api/v1/runs/{run.pk}/nodes").json()["items"]
        assert (first["outcome"], first["reason"], first["detail"]) == (outcome, "why", "what")
        assert (second["outcome"], second["reason"], second["detail"]) == (other, "", "")
        assert first["left_at"] and second["left_at"]

    def test_every_attempt_is_told_newest_first_with_each_hosts_own_words(self, ada: APIClient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doorbell, "ring", lambda *_: True)
        one, two = people.worker("one", host="h1"), people.worker("two", host="h2")
        run, _ = granted(one, two)
        leave_node(run.pk, 1, 1, outcome="failed", reason="rank_killed", detail="rank 1 was ended by SIGKILL")
        Presence.objects.create(name="web", up_since=after_now(-60), last_seen=after_now(0))
        Run.objects.filter(pk=run.pk).update(lease_until=after_now(-1))
        reconcile_once()
        assert [bool(ask(worker)) for worker in (one, two)] == [False, True]
        told = ada.get(f"/api/v1/runs/{run.pk}/nodes").json()["items"]
        assert [(row["attempt"], row["rank"], row["host"], row["outcome"], row["reason"]) for row in told] == [
            (2, 0, "h1", "", ""),
            (2, 1, "h2", "", ""),
            (1, 0, "h1", "failed", "worker_lost"),
            (1, 1, "h2", "failed", "rank_killed"),
        ]
        assert Node.objects.filter(attempt=0).count() == 0 and ada.get(f"/api/v1/runs/{people.queued().pk}/nodes").json()["items"] == []

    def test_the_page_tells_it_and_trusts_no_words(self, client: Client) -> None:
        run, _ = granted(people.worker("one", host="h1"), people.worker("two"))
        client.force_login(people.ada())

        def rows() -> list[str]:
            page = client.get(f"/runs/{run.pk}/panel/timeline").content.decode()
            return [" ".join(row.split("</li>")[0].split()) for row in page.split('id="hosts"')[1].split("<li>")[1:]]

        first, second = rows()
        assert "one on h1, rank 0 on cpu:0" in first and ">on it<" in first and "two, rank 1 on cpu:0" in second
        Node.objects.filter(run=run, rank=1).update(token_sha256="")
        assert ">called<" in rows()[1]
        leave_node(run.pk, 1, 1, outcome="failed", reason="rank_killed", detail="<b>rank 1</b>")
        assert 'data-state="failed">failed<' in rows()[1] and "<strong>rank killed</strong>: &lt;b&gt;rank 1&lt;/b&gt;" in rows()[1]

    def test_ranks_are_numbered_through_the_hosts(self, ada: APIClient) -> None:
        run = people.queued(parallel={"data": 2, "expert": 2, "nodes": 2}, training={"steps": 20, "batch_size": 4})
        gpus = ["cuda:0", "cuda:1"]
        assert [bool(ask(people.worker(name, cuda=2), gpus)) for name in ("one", "two")] == [False, False]
        assert ask(Worker.objects.get(name="one"), gpus)
        assert [node["ranks"] for node in ada.get(f"/api/v1/runs/{run.pk}").json()["nodes"]] == [[0, 1], [2, 3]]


@pytest.mark.django_db
def test_a_worker_gets_its_part_over_rest(as_user: Speak) -> None:
    worker = as_user(None, "worker")
    pair()
    bodies = [{"worker": people.worker(name).pk, "free_slots": 1, "free_devices": ["cpu:0"]} for name in ("one", "two")]
    assert worker.post("/api/v1/worker/claim", bodies[0], format="json").status_code == 204
    last, first = (worker.post("/api/v1/worker/claim", body, format="json").json() for body in reversed(bodies))
    assert [(part["node"], part["nodes"], part["attempt"]) for part in (first, last)] == [(0, 2, 1), (1, 2, 1)]
    assert last["ingest_url"].endswith("?attempt=1&node=1") and first["token"] != last["token"]


@pytest.mark.django_db
class TestAHostOfAnAttempt:
    def test_where_the_ranks_meet_reaches_the_others(self) -> None:
        run, _ = granted(people.worker("one"), people.worker("two"))
        assert hosts_of(run.pk, 1).rendezvous == ""
        announce(run.pk, 1, "10.0.0.1:4711")
        command = renew_lease(run.pk, 1)
        assert command and command.hosts and (command.hosts.rendezvous, command.hosts.lost) == ("10.0.0.1:4711", None)

    def test_a_host_that_is_not_heard_from_is_given_up_and_node_0_is_told_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doorbell, "ring", lambda *_: True)
        run, _ = granted(people.worker("one"), people.worker("two"))
        Presence.objects.create(name="web", up_since=after_now(-60), last_seen=after_now(0))
        assert renew_node(run.pk, 1, 1)
        reconcile_once()
        assert hosts_of(run.pk, 1).lost is None
        Node.objects.filter(run=run, rank=1).update(lease_until=after_now(-1))
        assert reconcile_once() == [], "the attempt is node 0's to end"
        assert hosts_of(run.pk, 1).lost == ("worker_lost", "node 1 on two was not heard from for its whole lease")
        assert not renew_node(run.pk, 1, 1), "it is fenced, should it come back"
        assert renew_lease(run.pk, 1) is not None

    def test_after_an_outage_no_host_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doorbell, "ring", lambda *_: True)
        run, _ = granted(people.worker("one"), people.worker("two"))
        Node.objects.filter(run=run, rank=1).update(lease_until=after_now(-1))
        Presence.objects.create(name="web", up_since=after_now(-5), last_seen=after_now(0))
        reconcile_once()
        assert hosts_of(run.pk, 1).lost is None and renew_node(run.pk, 1, 1)

    @staticmethod
    def of_three() -> Run:
        """A run that three workers have been granted."""
        run = people.queued(parallel={"data": 3, "nodes": 3}, training={"steps": 20, "batch_size": 3})
        workers = [people.worker(name) for name in ("one", "two", "three")]
        assert [bool(ask(worker)) for worker in workers] == [False, False, True]
        return run

    def test_the_reason_of_a_host_comes_before_that_of_one_which_only_lost_its_peers(self) -> None:
        run = self.of_three()
        leave_node(run.pk, 1, 1, outcome="failed", reason="peer_lost", detail="connection reset")
        assert hosts_of(run.pk, 1).lost is None, "the third may still say why"
        leave_node(run.pk, 1, 2, outcome="failed", reason="rank_killed", detail="rank 2 was ended by SIGKILL")
        leave_node(run.pk, 1, 2, outcome="failed", reason="error", detail="twice")
        assert hosts_of(run.pk, 1).lost == ("rank_killed", "rank 2 was ended by SIGKILL")

    def test_of_two_hosts_with_reasons_of_their_own_the_first_to_go_has_the_word(self) -> None:
        run = self.of_three()
        leave_node(run.pk, 1, 2, outcome="failed", reason="rank_killed", detail="rank 2 was ended by SIGKILL")
        Node.objects.filter(run=run, left_at__isnull=False).update(left_at=after_now(-1))
        leave_node(run.pk, 1, 1, outcome="failed", reason="error", detail="what came of it")
        announce(run.pk, 1, "10.0.0.1:4711")
        assert hosts_of(run.pk, 1) == Hosts("10.0.0.1:4711", ("rank_killed", "rank 2 was ended by SIGKILL"))

    def test_a_later_attempt_fences_every_host(self) -> None:
        one, two = people.worker("one"), people.worker("two")
        run, claims = granted(one, two)
        Run.objects.filter(pk=run.pk).update(state=State.QUEUED)
        assert not renew_node(run.pk, 1, 1) and renew_lease(run.pk, 1) is None
        assert ask(two) is None
        assert ask(one)
        assert Run.objects.get(pk=run.pk).attempt == 2
        assert not renew_node(run.pk, 1, 1)
        assert authenticate_ingest(run.pk, 2, claims[1].token, node=1) is None

    def test_the_hosts_devices_are_taken_until_the_attempt_is_over_and_then_all_free(self) -> None:
        one, two = people.worker("one"), people.worker("two")
        run, _ = granted(one, two)
        singles = [people.queued(), people.queued()]
        leave_node(run.pk, 1, 1, outcome="failed", reason="rank_killed", detail="")
        assert ask(one) is None and ask(two) is None
        Run.objects.filter(pk=run.pk).update(state=State.FAILED)
        assert {ask(one).run, ask(two).run} == set(singles)  # type: ignore[union-attr]

    def test_a_part_that_its_worker_never_took_is_lost_like_any_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doorbell, "ring", lambda *_: True)
        one, two = people.worker("one"), people.worker("two")
        run = pair()
        ask(two)
        assert ask(one)
        Presence.objects.create(name="web", up_since=after_now(-60), last_seen=after_now(0))
        Run.objects.filter(pk=run.pk).update(lease_until=after_now(-1))
        assert reconcile_once() == [run.pk], "node 0 was two's"
        assert ask(two) is None, "what it was granted is over; it has a new place"
        assert Node.objects.filter(run=run, attempt=0, worker=two).exists()


@pytest.mark.django_db
class TestAPartThatIsNeverTaken:
    @pytest.fixture(autouse=True)
    def _reconciler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doorbell, "ring", lambda *_: True)
        Presence.objects.create(name="web", up_since=after_now(-60), last_seen=after_now(0))

    @staticmethod
    def half_taken() -> Run:
        """A pair that was granted to one and two; one has taken its part as node 0."""
        run, workers = pair(), [Worker.objects.filter(name=name).first() or people.worker(name) for name in ("one", "two")]
        assert [ask(worker) for worker in workers[:1]] == [None]
        assert ask(workers[1])
        assert ask(workers[0])
        Node.objects.filter(run=run, rank=1).update(token_sha256="")
        return Run.objects.get(pk=run.pk)

    @staticmethod
    def given_up(run: Run, reason: str = "worker_lost") -> Run:
        """The run once node 1's time has passed and node 0 has ended the attempt for that reason."""
        Node.objects.filter(run=run, attempt=run.attempt, rank=1).update(lease_until=after_now(-1))
        reconcile_once()
        end_attempt(run.pk, run.attempt, RunEnded(at=1.0, outcome="failed", reason=reason, detail="node 1 on two did not take its part in time"))
        return Run.objects.get(pk=run.pk)

    def test_it_says_so_and_says_nothing_against_the_run(self) -> None:
        run = self.half_taken()
        Node.objects.filter(run=run, rank=1).update(lease_until=after_now(-1))
        reconcile_once()
        assert hosts_of(run.pk, 1).lost == ("worker_lost", "node 1 on two did not take its part in time")
        run = self.given_up(run)
        assert (run.state, run.attempts_without_progress, run.attempts_not_taken) == (State.QUEUED, 0, 1)

    def test_node_0s_part_likewise(self) -> None:
        run = self.half_taken()
        Node.objects.filter(run=run, rank=0).update(token_sha256="")
        Run.objects.filter(pk=run.pk).update(lease_until=after_now(-1))
        assert reconcile_once() == [run.pk]
        run.refresh_from_db()
        assert (run.state, run.attempts_without_progress, run.attempts_not_taken) == (State.QUEUED, 0, 1)

    def test_one_that_was_taken_and_then_lost_counts(self) -> None:
        run, _ = granted(people.worker("one"), people.worker("two"))
        run = self.given_up(Run.objects.get(pk=run.pk))
        assert (run.state, run.attempts_without_progress, run.attempts_not_taken) == (State.QUEUED, 1, 0)

    def test_a_failure_of_node_0_while_the_other_still_has_time_counts(self) -> None:
        run = self.half_taken()
        end_attempt(run.pk, 1, RunEnded(at=1.0, outcome="failed", reason="no_meeting"))
        run.refresh_from_db()
        assert (run.attempts_without_progress, run.attempts_not_taken) == (1, 0)

    def test_it_does_not_go_on_for_ever(self) -> None:
        run = self.half_taken()
        for tried in range(1, MAX_ATTEMPTS_NOT_TAKEN):
            run = self.given_up(run)
            assert (run.state, run.attempts_not_taken) == (State.QUEUED, tried)
            Run.objects.filter(pk=run.pk).update(state=State.STARTING, lease_until=after_now(15))
        run = self.given_up(run)
        assert (run.state, run.reason) == (State.FAILED, "restart_limit")
        assert run.detail.startswith("10 attempts in which a host did not take its part; the last ended with worker_lost. node 1 on two")

    def test_an_attempt_that_trains_wipes_the_slate(self) -> None:
        run = self.half_taken()
        Run.objects.filter(pk=run.pk).update(attempts_not_taken=9)
        start_attempt(run.pk, 1, RunStarted(attempt=1, at=1.0, steps=20))
        run = self.given_up(run)
        assert (run.state, run.attempts_not_taken) == (State.QUEUED, 1)

    def test_a_run_that_was_paused_and_resumed_has_all_its_tries_again(self) -> None:
        run = pair()
        Run.objects.filter(pk=run.pk).update(state=State.PAUSED, desired="pause", attempts_not_taken=9)
        resume(run.pk, by="user:ada")
        run.refresh_from_db()
        assert run.attempts_not_taken == 0
