"""The hosts of an attempt: each speaks for itself, may never take its part, and is told of."""

from __future__ import annotations

import pytest
from django.test import Client
from rest_framework.test import APIClient

from experiments import doorbell
from experiments.actions.attempt import MAX_ATTEMPTS_NOT_TAKEN, authenticate_ingest, end_attempt, renew_lease, start_attempt
from experiments.actions.node import LAST_WORD_S, Hosts, LastWord, announce, hang, hosts_of, leave_node, renew_node
from experiments.actions.now import after_now
from experiments.actions.resume import resume
from experiments.models import Node, Presence, Run, State, Worker
from experiments.reconcile import reconcile_once
from spec.events import RunEnded, RunStarted
from tests.experiments.engine import people
from tests.experiments.engine.pairs import ask, granted, pair


@pytest.mark.django_db
def test_the_hosts_are_shown_with_the_run_and_the_run_with_each_host(ada: APIClient) -> None:
    one, two = people.worker("one", host="h1"), people.worker("two", host="h2")
    run, _ = granted(one, two)
    shown = ada.get(f"/api/v1/runs/{run.pk}").json()
    assert (shown["node_count"], shown["worker"]) == (2, "one")
    same = {"attempt": 1, "devices": ["cpu:0"], "outcome": "", "reason": "", "detail": "", "left_at": None, "exit_code": None, "signal": None}
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
        leave_node(run.pk, 1, 1, LastWord("failed", "rank_killed", "rank 1 was ended by SIGKILL"))
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

    def test_a_host_that_others_ended_may_say_for_a_short_time_how_it_did(self, ada: APIClient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doorbell, "ring", lambda *_: True)
        run, _ = granted(people.worker("one"), people.worker("two"))
        end_attempt(run.pk, 1, RunEnded(at=1.0, outcome="failed", reason="hang", detail="no sign", signal=9, log_tail="[0] File a.py"))
        word = LastWord("failed", "rank_killed", "rank 1 was ended by SIGSEGV", None, 11, "[1] Fatal Python error")
        assert not leave_node(run.pk, 2, 1, word) and not leave_node(run.pk, 1, 0, word), "node 0 has spoken by RunEnded"
        assert leave_node(run.pk, 1, 1, word)
        assert not leave_node(run.pk, 1, 1, LastWord("failed", "error", "twice"))
        first, second = ada.get(f"/api/v1/runs/{run.pk}/nodes").json()["items"]
        assert [first[name] for name in ("reason", "signal", "log_tail")] == ["hang", 9, "[0] File a.py"]
        assert [second[name] for name in ("outcome", "reason", "detail", "exit_code", "signal", "log_tail")] == [
            *("failed", "rank_killed", "rank 1 was ended by SIGSEGV", None, 11, "[1] Fatal Python error")
        ]
        assert "log_tail" not in ada.get(f"/api/v1/runs/{run.pk}").json()["nodes"][0]
        assert Run.objects.get(pk=run.pk).reason == "hang", "that was the attempt's end"

    def test_too_late_a_word_is_not_taken_nor_one_of_a_host_that_was_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doorbell, "ring", lambda *_: True)
        run, _ = granted(people.worker("one"), people.worker("two"))
        end_attempt(run.pk, 1, RunEnded(at=1.0, outcome="failed", reason="hang"))
        Node.objects.filter(run=run, rank=1).update(left_at=after_now(-LAST_WORD_S - 1))
        assert not leave_node(run.pk, 1, 1, LastWord("failed", "error", "late"))
        other, _ = granted(people.worker("three"), people.worker("four"))
        leave_node(other.pk, 1, 1, LastWord("failed", "worker_lost", "not heard from"))
        assert not leave_node(other.pk, 1, 1, LastWord("failed", "error", "it was alive"))

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
        leave_node(run.pk, 1, 1, LastWord("failed", "rank_killed", "<b>rank 1</b>", None, 9, "<i>stack</i>"))
        assert "signal 9" in rows()[1] and '<pre tabindex="0">&lt;i&gt;stack&lt;/i&gt;</pre>' in rows()[1]
        assert 'data-state="failed">failed<' in rows()[1] and "<strong>rank killed</strong>: &lt;b&gt;rank 1&lt;/b&gt;" in rows()[1]

    def test_ranks_are_numbered_through_the_hosts(self, ada: APIClient) -> None:
        run = people.queued(parallel={"data": 2, "expert": 2, "nodes": 2}, training={"steps": 20, "batch_size": 4})
        gpus = ["cuda:0", "cuda:1"]
        assert [bool(ask(people.worker(name, cuda=2), gpus)) for name in ("one", "two")] == [False, False]
        assert ask(Worker.objects.get(name="one"), gpus)
        assert [node["ranks"] for node in ada.get(f"/api/v1/runs/{run.pk}").json()["nodes"]] == [[0, 1], [2, 3]]


@pytest.mark.django_db
class TestAHostOfAnAttempt:
    def test_where_the_ranks_meet_reaches_the_others(self) -> None:
        run, _ = granted(people.worker("one"), people.worker("two"))
        assert hosts_of(run.pk, 1).rendezvous == ""
        announce(run.pk, 1, "10.0.0.1:4711")
        command = renew_lease(run.pk, 1)
        assert command and command.hosts and (command.hosts.rendezvous, command.hosts.lost) == ("10.0.0.1:4711", None)

    def test_that_the_ranks_stand_still_reaches_the_others(self) -> None:
        run, _ = granted(people.worker("one"), people.worker("two"))
        assert not hosts_of(run.pk, 1).hanging
        hang(run.pk, 1)
        assert hosts_of(run.pk, 1).hanging

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
        leave_node(run.pk, 1, 1, LastWord("failed", "peer_lost", "connection reset"))
        assert hosts_of(run.pk, 1).lost is None, "the third may still say why"
        leave_node(run.pk, 1, 2, LastWord("failed", "rank_killed", "rank 2 was ended by SIGKILL"))
        leave_node(run.pk, 1, 2, LastWord("failed", "error", "twice"))
        assert hosts_of(run.pk, 1).lost == ("rank_killed", "rank 2 was ended by SIGKILL")

    def test_of_two_hosts_with_reasons_of_their_own_the_first_to_go_has_the_word(self) -> None:
        run = self.of_three()
        leave_node(run.pk, 1, 2, LastWord("failed", "rank_killed", "rank 2 was ended by SIGKILL"))
        Node.objects.filter(run=run, left_at__isnull=False).update(left_at=after_now(-1))
        leave_node(run.pk, 1, 1, LastWord("failed", "error", "what came of it"))
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
        leave_node(run.pk, 1, 1, LastWord("failed", "rank_killed", ""))
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
