"""What is lost is found again, and nobody is blamed for our own absence."""

from __future__ import annotations

import threading

import pytest
from django.db import connection

from experiments import doorbell
from experiments.actions.cancel import cancel
from experiments.actions.claim import claim
from experiments.actions.now import after_now
from experiments.actions.record import record
from experiments.models import Presence, Project, Run, State
from experiments.reconcile import keep_presence, reconcile_once, run_forever
from tests.experiments.engine import people

pytestmark = pytest.mark.django_db


@pytest.fixture
def rung(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    rings: list[bool] = []
    monkeypatch.setattr(doorbell, "ring", lambda: rings.append(True) or True)
    return rings


def silent() -> Run:
    """A run whose worker has not been heard from for its whole lease."""
    run = people.queued()
    claim(Run.objects.filter(pk=run.pk), worker=people.worker(f"w{run.pk}"), free_slots=1, free_devices=["cpu:0"])
    Run.objects.filter(pk=run.pk).update(lease_until=after_now(-1))
    return run


def present(up_s: float = 21, seen_s: float = 1) -> None:
    Presence.objects.create(name=f"up {up_s} {seen_s}", up_since=after_now(-up_s), last_seen=after_now(-seen_s))


def state(run: Run) -> str:
    return Run.objects.get(pk=run.pk).state


def test_a_dead_lease_is_queued_again_and_the_bell_rung(rung: list[bool]) -> None:
    run = silent()
    present()
    assert reconcile_once() == [run.pk]
    found = Run.objects.get(pk=run.pk)
    assert (found.state, found.reason, found.attempts_without_progress) == (State.QUEUED, "worker_lost", 1)
    assert rung == [True]


def test_a_living_lease_is_left_alone(rung: list[bool]) -> None:
    run = silent()
    Run.objects.filter(pk=run.pk).update(lease_until=after_now(5))
    present()
    assert reconcile_once() == []
    assert state(run) == State.STARTING and rung == []


@pytest.mark.parametrize(("up_s", "seen_s"), [(19, 1), (3600, 8)], ids=["just started", "itself silent"])
def test_after_an_outage_leases_are_not_judged_until_supervisors_could_speak(rung: list[bool], up_s: float, seen_s: float) -> None:
    run = silent()
    present(up_s, seen_s)
    assert reconcile_once() == []
    assert state(run) == State.STARTING


def test_a_presence_that_was_interrupted_counts_as_new() -> None:
    keep_presence("web")
    Presence.objects.filter(name="web").update(up_since=after_now(-900), last_seen=after_now(-5))
    keep_presence("web")
    age = Presence.objects.filter(name="web", up_since__lt=after_now(-800)).exists()
    assert age, "five seconds are no gap"
    Presence.objects.filter(name="web").update(last_seen=after_now(-7))
    keep_presence("web")
    assert not Presence.objects.filter(name="web", up_since__lt=after_now(-5)).exists()


def test_queued_runs_ring_each_round_and_cancelled_ones_end(rung: list[bool]) -> None:
    people.queued()
    dying = silent()
    cancel(dying.pk, by="user:ada")
    present()
    reconcile_once()
    reconcile_once()
    assert state(dying) == State.CANCELLED and rung == [True, True]


def test_a_recorded_run_outlives_its_lease_until_its_cancelling_goes_unanswered(rung: list[bool]) -> None:
    run = record(user=people.ada(), project=Project.default(), name="theirs")
    Run.objects.filter(pk=run.pk).update(lease_until=after_now(-9999))
    present()
    assert reconcile_once() == []
    cancel(run.pk, by="user:ada")
    assert reconcile_once() == []
    Run.objects.filter(pk=run.pk).update(updated_at=after_now(-61))
    assert reconcile_once() == [run.pk]
    assert state(run) == State.CANCELLED


@pytest.mark.django_db(transaction=True)
def test_only_one_of_two_processes_does_the_round(rung: list[bool]) -> None:
    runs = [silent() for _ in range(5)]
    present()
    barrier, found = threading.Barrier(4), []

    def round_() -> None:
        barrier.wait()
        found.extend(reconcile_once())
        connection.close()

    threads = [threading.Thread(target=round_) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [run.pk for run in runs]
    assert all(Run.objects.get(pk=run.pk).transitions.filter(reason="worker_lost").count() == 1 for run in runs)


@pytest.mark.django_db(transaction=True)
def test_the_thread_keeps_its_presence_and_stops_when_told(monkeypatch: pytest.MonkeyPatch, rung: list[bool]) -> None:
    monkeypatch.setattr("experiments.reconcile.PRESENCE_EVERY_S", 0.02)
    monkeypatch.setattr("experiments.reconcile.EVERY_S", 0.05)
    people.queued()
    stop = threading.Event()
    thread = threading.Thread(target=run_forever, args=(stop,))
    thread.start()
    for _ in range(200):
        if rung and Presence.objects.exists():
            break
        stop.wait(0.02)
    stop.set()
    thread.join(5)
    assert not thread.is_alive() and rung and Presence.objects.count() == 1
