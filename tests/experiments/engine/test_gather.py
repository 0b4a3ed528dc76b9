"""Runs on several hosts: all of them get it at once or nobody does, nobody waits for ever, and each host speaks for itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from django.db import connection
from rest_framework.test import APIClient

from experiments import doorbell
from experiments.actions.attempt import authenticate_ingest, renew_lease
from experiments.actions.cancel import cancel
from experiments.actions.claim import Claim, claim
from experiments.actions.gather import GATHER_S, PATIENCE_S
from experiments.actions.node import announce, hosts_of, leave_node, renew_node
from experiments.actions.now import after_now
from experiments.models import Node, Presence, Run, State, Transition, Worker
from experiments.reconcile import reconcile_once
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
    same = {"devices": ["cpu:0"], "outcome": "", "reason": "", "detail": ""}
    assert shown["nodes"] == [{"rank": 0, "worker": "one", "host": "h1", **same}, {"rank": 1, "worker": "two", "host": "h2", **same}]
    workers = {row["name"]: (row["busy"], row["runs"]) for row in ada.get("/api/v1/workers").json()["items"]}
    assert workers == {"one": (1, [run.pk]), "two": (1, [run.pk])}
    alone = people.queued()
    assert ada.get(f"/api/v1/runs/{alone.pk}").json()["nodes"] == []


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

    def test_the_reason_of_a_host_comes_before_that_of_one_which_only_lost_its_peers(self) -> None:
        run = people.queued(parallel={"data": 3, "nodes": 3}, training={"steps": 20, "batch_size": 3})
        for name in ("one", "two", "three"):
            ask(people.worker(name)) if name == "three" else people.worker(name)
        for name in ("one", "two"):
            ask(Worker.objects.get(name=name))
        leave_node(run.pk, 1, 1, outcome="failed", reason="peer_lost", detail="connection reset")
        assert hosts_of(run.pk, 1).lost is None, "the third may still say why"
        leave_node(run.pk, 1, 2, outcome="failed", reason="rank_killed", detail="rank 2 was ended by SIGKILL")
        leave_node(run.pk, 1, 2, outcome="failed", reason="error", detail="twice")
        assert hosts_of(run.pk, 1).lost == ("rank_killed", "rank 2 was ended by SIGKILL")

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
