"""Users, a worker, its supervisor and the reconciler act on one run in any order, and every message may come twice, late or never.

The rules of the machine are written down here once more, from docs/protocol.md, and compared after each act.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from django.db import transaction
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from experiments.actions.attempt import end_attempt, record_checkpoint, renew_lease, start_attempt
from experiments.actions.cancel import cancel
from experiments.actions.checkpoint_now import checkpoint_now
from experiments.actions.claim import claim
from experiments.actions.now import after_now
from experiments.actions.pause import pause
from experiments.actions.resume import resume
from experiments.actions.transition import StateConflict, locked
from experiments.models import Presence, Run
from experiments.reconcile import reconcile_once
from spec.events import CheckpointSaved, RunEnded, RunStarted
from tests.experiments.engine import people

OVER = {"succeeded", "failed", "cancelled"}
LEASED = {"starting", "running", "pausing", "stopping"}
ARROWS = {
    "": {"queued"},
    "queued": {"starting", "paused", "cancelled"},
    "starting": {"running", "pausing", "paused", "stopping", "queued", *OVER},
    "running": {"pausing", "paused", "stopping", "queued", *OVER},
    "pausing": {"running", "paused", "stopping", "queued", *OVER},
    "paused": {"queued", "cancelled"},
    "stopping": OVER,
}
Message = Callable[[], None]


class OneRun(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.run_id = people.queued().pk
        self.worker = people.worker(f"w{self.run_id}", slots=1000)
        self.sent: list[tuple[int, Message]] = []
        self.claims = 0
        self.ended_as: tuple[str, str] | None = None
        self.checkpoint = 0

    @property
    def run(self) -> Run:
        return Run.objects.get(pk=self.run_id)

    def deliver(self, attempt: int, message: Message) -> None:
        """As ingest does it: in a transaction that holds the row. A fenced attempt's word changes nothing."""
        before = self.run
        with transaction.atomic():
            locked(self.run_id)
            message()
        after = self.run
        if before.attempt != attempt or before.state not in LEASED:
            assert (after.state, after.reason, after.attempt) == (before.state, before.reason, before.attempt)

    # ----- people

    @rule(act=st.sampled_from(["cancel", "pause", "resume", "checkpoint"]))
    def ask(self, act: str) -> None:
        verbs = {
            "cancel": lambda: cancel(self.run_id, by="user:ada"),
            "pause": lambda: pause(self.run_id, by="user:ada"),
            "resume": lambda: resume(self.run_id, by="user:ada"),
            "checkpoint": lambda: checkpoint_now(self.run_id),
        }
        with contextlib.suppress(StateConflict):
            verbs[act]()

    # ----- the worker

    @rule()
    def take(self) -> None:
        was = self.run.state
        found = claim(Run.objects.filter(pk=self.run_id), worker=self.worker, free_slots=1, free_devices=["cpu:0"])
        assert (found is not None) == (was == "queued")
        self.claims += found is not None

    @precondition(lambda self: self.claims > 0)
    @rule(data=st.data(), step=st.integers(0, 50))
    def start(self, data: st.DataObject, step: int) -> None:
        attempt = data.draw(st.integers(1, self.claims))
        event = RunStarted(attempt=attempt, at=1.0, resumed_from_step=step or None, steps=100)
        self.send(attempt, lambda: start_attempt(self.run_id, attempt, event))

    @precondition(lambda self: self.claims > 0)
    @rule(step=st.integers(1, 60))
    def save(self, step: int) -> None:
        attempt, event = self.claims, CheckpointSaved(step=step, at=1.0, path=f"/c/{step}", size_bytes=1, sha256="0" * 64, seconds=0.1)
        self.send(attempt, lambda: record_checkpoint(self.run_id, attempt, event))

    @precondition(lambda self: self.claims > 0)
    @rule(
        data=st.data(),
        outcome=st.sampled_from(["succeeded", "failed", "cancelled", "paused"]),
        reason=st.sampled_from(["rank_killed", "hang", "oom", "nan_loss", "error", ""]),
    )
    def end(self, data: st.DataObject, outcome: str, reason: str) -> None:
        attempt = data.draw(st.integers(1, self.claims))
        event = RunEnded(at=2.0, outcome=outcome, reason=reason)
        self.send(attempt, lambda: end_attempt(self.run_id, attempt, event))

    def send(self, attempt: int, message: Message) -> None:
        self.sent.append((attempt, message))
        self.deliver(attempt, message)

    @precondition(lambda self: bool(self.sent))
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        self.deliver(*data.draw(st.sampled_from(self.sent)))

    @precondition(lambda self: self.claims > 0)
    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        attempt, run = data.draw(st.integers(1, self.claims)), self.run
        assert (renew_lease(self.run_id, attempt) is not None) == (attempt == run.attempt and run.state in LEASED)

    # ----- silence

    @rule()
    def the_worker_falls_silent(self) -> None:
        before = self.run
        Run.objects.filter(pk=self.run_id, lease_until__isnull=False).update(lease_until=after_now(-1))
        reconcile_once()
        run = self.run
        if before.state in LEASED:
            assert run.state in {"queued", "failed", "paused", "cancelled"}
            assert (run.state == "cancelled") == (before.desired == "cancel")
        else:
            assert run.state == before.state

    # ----- what always holds

    @invariant()
    def everything_is_lawful(self) -> None:
        run = self.run
        self.history_is_one_chain_of_lawful_steps(run)
        self.an_end_is_an_end(run)
        assert run.attempt == self.claims == len(run.attempt_token_sha256s)
        assert (run.lease_until is not None) == (run.state in LEASED)
        assert run.attempts_without_progress < 3 or run.state == "failed"
        assert run.reason != "restart_limit" or run.state == "failed"
        assert run.progress_checkpoint_step >= self.checkpoint
        self.checkpoint = run.progress_checkpoint_step

    def history_is_one_chain_of_lawful_steps(self, run: Run) -> None:
        at = ""
        for before, after in run.transitions.order_by("id").values_list("from_state", "to_state"):
            assert before == at
            assert after in ARROWS[at], f"{at} → {after}"
            at = after
        assert run.state == at

    def an_end_is_an_end(self, run: Run) -> None:
        if self.ended_as is not None:
            assert (run.state, run.reason) == self.ended_as
        elif run.state in OVER:
            self.ended_as = (run.state, run.reason)
            assert run.ended_at is not None


@pytest.mark.django_db
def test_whatever_happens_in_whatever_order() -> None:
    name = "this process"
    Presence.objects.create(name=name, up_since=after_now(-3600), last_seen=after_now(3600))
    run_state_machine_as_test(
        OneRun,
        settings=settings(
            max_examples=20, stateful_step_count=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        ),
    )
