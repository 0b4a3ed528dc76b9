"""Claims: exactly one worker gets a run, and only one that it has room for."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from django.db import connection
from django.utils import timezone

from experiments.actions.attempt import authenticate_ingest, renew_lease
from experiments.actions.claim import Claim, claim
from experiments.models import Run, State, Worker
from tests.experiments.engine import people

GPUS = ["cuda:0", "cuda:1"]


def take(worker: Worker, devices: list[str] | None = None, slots: int = 8) -> Claim | None:
    return claim(Run.objects.all(), worker=worker, free_slots=slots, free_devices=["cpu:0"] if devices is None else devices)


@pytest.mark.django_db(transaction=True)
def test_of_many_workers_at_once_exactly_one_gets_a_run() -> None:
    runs = [people.queued() for _ in range(3)]
    workers = [people.worker(f"w{i}", slots=3) for i in range(8)]
    barrier, got = threading.Barrier(len(workers)), []

    def race(worker: Worker) -> None:
        barrier.wait()
        try:
            while (claimed := take(worker)) is not None:
                got.append((claimed.run.pk, claimed.run.attempt))
        finally:
            connection.close()

    threads = [threading.Thread(target=race, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [(run.pk, 1) for run in runs]
    assert Run.objects.filter(state=State.STARTING, attempt=1).count() == 3


@pytest.mark.django_db(transaction=True)
def test_one_worker_that_asks_twice_at_once_does_not_take_more_than_its_slots() -> None:
    for _ in range(4):
        people.queued()
    worker = people.worker(slots=2)
    barrier, got = threading.Barrier(4), []

    def race() -> None:
        barrier.wait()
        got.append(take(worker, slots=1))
        connection.close()

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claimed is not None for claimed in got) == 2


@pytest.mark.django_db
class TestWhichRun:
    def test_the_most_urgent_first_then_the_oldest(self) -> None:
        old, new, urgent = people.queued(), people.queued(), people.queued(priority=5)
        worker = people.worker(slots=3)
        assert [claimed.run.pk for claimed in (take(worker), take(worker), take(worker)) if claimed] == [urgent.pk, old.pk, new.pk]

    def test_a_run_that_does_not_fit_lets_the_next_one_pass(self) -> None:
        people.queued(priority=9, parallel={"data": 2, "device": "cuda"})
        small = people.queued()
        claimed = take(people.worker(cuda=1), ["cpu:0", "cuda:0"])
        assert claimed and claimed.run.pk == small.pk and claimed.devices == ["cuda:0"]

    def test_auto_waits_for_a_busy_gpu_but_takes_the_cpu_where_there_is_none(self) -> None:
        people.queued()
        assert take(people.worker("gpu", cuda=1, slots=4), ["cpu:0"]) is None
        claimed = take(people.worker("cpu"))
        assert claimed and claimed.devices == ["cpu:0"]

    def test_two_ranks_get_two_gpus_and_no_device_twice(self) -> None:
        people.queued(parallel={"data": 2, "device": "cuda"})
        people.queued(parallel={"device": "cuda"})
        worker = people.worker(cuda=2, slots=4)
        first = take(worker, GPUS)
        assert first and first.devices == GPUS
        assert take(worker, GPUS) is None, "the server's own books say that both are taken"

    def test_a_run_with_checkpoints_waits_for_the_living_host_that_holds_them(self) -> None:
        run, home, other = people.queued(), people.worker("home"), people.worker("other")
        Run.objects.filter(pk=run.pk).update(worker=home, progress_checkpoint_step=10)
        assert take(other) is None
        Worker.objects.filter(pk=home.pk).update(last_seen=timezone.now() - timedelta(minutes=5))
        assert take(other) is not None

    def test_a_run_that_begins_from_another_hosts_checkpoint_waits_for_that_host_while_it_lives(self) -> None:
        run, holder = people.queued(), people.worker("holder")
        Worker.objects.filter(pk=holder.pk).update(host="there")
        Run.objects.filter(pk=run.pk).update(resume_from={"run": 1, "step": 40, "path": "/c/40", "host": "there"})
        plain = people.queued()
        here = people.worker("here", slots=3)
        assert take(here).run == plain
        assert take(here) is None
        Worker.objects.filter(pk=holder.pk).update(last_seen=timezone.now() - timedelta(minutes=5))
        assert take(here).run == run

    def test_neither_paused_nor_cancelled_nor_full(self) -> None:
        run = people.queued()
        worker = people.worker()
        assert take(worker, slots=0) is None
        Run.objects.filter(pk=run.pk).update(state=State.PAUSED)
        assert take(worker) is None


@pytest.mark.django_db
class TestTheToken:
    def test_it_speaks_for_its_own_attempt_only_and_is_not_stored(self) -> None:
        run, other = people.queued(), people.queued()
        claimed = take(people.worker())
        assert claimed and claimed.run.pk == run.pk
        grant = authenticate_ingest(run.pk, 1, claimed.token)
        assert grant and (grant.run_id, grant.attempt, grant.is_recorder) == (run.pk, 1, False)
        assert authenticate_ingest(run.pk, 2, claimed.token) is None
        assert authenticate_ingest(run.pk, 0, claimed.token) is None
        assert authenticate_ingest(other.pk, 1, claimed.token) is None
        assert authenticate_ingest(run.pk, 1, claimed.token + "x") is None
        assert claimed.token not in str(Run.objects.filter(pk=run.pk).values().get())

    def test_the_lease_is_fifteen_seconds_of_the_databases_clock_and_is_renewed(self) -> None:
        run = people.queued()
        claimed = take(people.worker())
        assert claimed
        with connection.cursor() as cursor:
            cursor.execute("SELECT extract(epoch FROM lease_until - clock_timestamp()) FROM experiments_run WHERE id = %s", [run.pk])
            assert 13 < cursor.fetchone()[0] <= 15
        command = renew_lease(run.pk, 1)
        assert command and (command.desired, command.checkpoint_requests) == ("run", 0)

    def test_a_later_attempt_fences_the_earlier_one(self) -> None:
        run = people.queued()
        first = take(people.worker("one"))
        assert first
        Run.objects.filter(pk=run.pk).update(state=State.QUEUED)
        assert renew_lease(run.pk, 1) is None, "it lost its lease"
        assert take(people.worker("two"))
        assert renew_lease(run.pk, 1) is None
        assert renew_lease(run.pk, 2) is not None
