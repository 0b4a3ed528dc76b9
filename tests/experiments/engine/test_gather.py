"""Runs on several hosts: all of them get it at once or nobody does, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from experiments import doorbell
from experiments.actions import gather
from experiments.actions.attempt import authenticate_ingest
from experiments.actions.cancel import cancel
from experiments.actions.claim import Claim
from experiments.actions.gather import GATHER_S
from experiments.actions.now import after_now
from experiments.models import Node, Run, State, Worker
from tests.experiments.engine import people
from tests.experiments.engine.conftest import Speak
from tests.experiments.engine.pairs import ask, has_waited, pair, places_are_over, state


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
class TestAQueueOfRunsThatCannotBeHad:
    @pytest.mark.parametrize("count", [3, 30])
    def test_they_hide_neither_a_run_on_several_hosts_nor_one_on_one_and_cost_no_query(self, count: int) -> None:
        busy, taken = people.worker("busy"), people.queued()
        assert ask(busy).run == taken  # type: ignore[union-attr]
        one, two = people.worker("one", slots=4), people.worker("two", slots=4)
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
def test_a_worker_gets_its_part_over_rest(as_user: Speak) -> None:
    worker = as_user(None, "worker")
    pair()
    bodies = [{"worker": people.worker(name).pk, "free_slots": 1, "free_devices": ["cpu:0"]} for name in ("one", "two")]
    assert worker.post("/api/v1/worker/claim", bodies[0], format="json").status_code == 204
    last, first = (worker.post("/api/v1/worker/claim", body, format="json").json() for body in reversed(bodies))
    assert [(part["node"], part["nodes"], part["attempt"]) for part in (first, last)] == [(0, 2, 1), (1, 2, 1)]
    assert last["ingest_url"].endswith("?attempt=1&node=1") and first["token"] != last["token"]
