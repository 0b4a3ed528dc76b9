"""How an attempt ends, and what becomes of its run."""

from __future__ import annotations

import pytest

from experiments.actions.attempt import authenticate_ingest, end_attempt, record_checkpoint, renew_lease, start_attempt
from experiments.actions.cancel import cancel
from experiments.actions.checkpoint_now import checkpoint_now
from experiments.actions.claim import claim
from experiments.actions.now import after_now
from experiments.actions.pause import pause
from experiments.actions.record import record
from experiments.actions.resume import resume
from experiments.actions.token import issue, revoke_named
from experiments.actions.transition import StateConflict
from experiments.models import Checkpoint, Project, Role, Run, State
from spec.events import CheckpointSaved, RunEnded, RunStarted
from tests.experiments.engine import people

pytestmark = pytest.mark.django_db


def claimed() -> Run:
    """A run in its first attempt."""
    run = people.queued()
    assert claim(Run.objects.filter(pk=run.pk), worker=people.worker(f"w{run.pk}", slots=9), free_slots=9, free_devices=["cpu:0"])
    return Run.objects.get(pk=run.pk)


def running() -> Run:
    run = claimed()
    start_attempt(run.pk, run.attempt, RunStarted(attempt=run.attempt, at=1.0, steps=77, devices=["CPU"], ops={"experts": "cpu"}))
    return Run.objects.get(pk=run.pk)


def again(run: Run) -> Run:
    """The run in its next attempt."""
    assert claim(Run.objects.filter(pk=run.pk), worker=run.worker, free_slots=9, free_devices=["cpu:0"])  # type: ignore[arg-type]
    return Run.objects.get(pk=run.pk)


def end(run: Run, outcome: str, reason: str = "", **said: object) -> Run:
    end_attempt(run.pk, run.attempt, RunEnded(at=2.0, outcome=outcome, reason=reason, **said))  # type: ignore[arg-type]
    return Run.objects.get(pk=run.pk)


def saved(step: int, path: str = "") -> CheckpointSaved:
    return CheckpointSaved(step=step, at=1.0, path=path or f"/checkpoints/{step}", size_bytes=9, sha256="a" * 64, seconds=0.5)


class TestTheStart:
    def test_it_runs_and_tells_what_it_is(self) -> None:
        run = running()
        assert (run.state, run.steps, run.device_names, run.ops) == (State.RUNNING, 77, ["CPU"], {"experts": "cpu"})
        assert run.started_at is not None and run.total_params > 0, "what the event leaves out stays as it was priced"

    def test_a_run_that_is_being_cancelled_does_not_turn_back_to_running(self) -> None:
        run = claimed()
        cancel(run.pk, by="user:ada")
        start_attempt(run.pk, 1, RunStarted(attempt=1, at=1.0))
        assert Run.objects.get(pk=run.pk).state == State.STOPPING

    def test_numbers_at_their_limits_and_long_names_fit_the_database(self) -> None:
        run, most = claimed(), 2**31 - 1
        event = RunStarted(attempt=1, at=1.0, steps=most, total_params=2**63 - 1, moe_layers=[most], devices=["d" * 999], ops={"x": "y" * 999})
        start_attempt(run.pk, 1, event)
        checkpoint = CheckpointSaved(step=most, at=99_999_999_999.0, path="p" * 9999, size_bytes=2**63 - 1, sha256="f" * 999, seconds=1.0)
        record_checkpoint(run.pk, 1, checkpoint)
        run = end(Run.objects.get(pk=run.pk), "failed", "error", detail="x" * 16_000, exit_code=-(2**31))
        assert (run.state, run.moe_layers, run.device_names) == (State.FAILED, [most], ["d" * 200])


class TestTheEnd:
    @pytest.mark.parametrize(
        ("outcome", "reason", "state"),
        [
            ("succeeded", "finished", "succeeded"),
            ("cancelled", "stopped", "cancelled"),
            *[("failed", reason, "failed") for reason in ("config_invalid", "nan_loss", "oom", "error", "disk_full")],
            *[("failed", reason, "queued") for reason in ("rank_killed", "worker_lost", "hang")],
            ("paused", "worker_stopping", "queued"),
        ],
    )
    def test_what_becomes_of_a_wanted_run(self, outcome: str, reason: str, state: str) -> None:
        run = end(running(), outcome, reason, detail="because", exit_code=1, signal=9)
        assert (run.state, run.reason, run.detail, run.exit_code, run.signal) == (state, reason, "because", 1, 9)

    @pytest.mark.parametrize("outcome", ["failed", "paused", "cancelled"])
    def test_a_run_that_is_being_cancelled_ends_as_cancelled(self, outcome: str) -> None:
        run = running()
        cancel(run.pk, by="user:ada")
        assert end(run, outcome, "oom").state == State.CANCELLED

    def test_one_that_finishes_before_the_cancelling_reaches_it_has_succeeded(self) -> None:
        run = running()
        cancel(run.pk, by="user:ada")
        assert end(run, "succeeded").state == State.SUCCEEDED

    def test_paused_as_asked_then_resumed_and_claimed_anew(self) -> None:
        run = running()
        assert pause(run.pk, by="user:ada").state == State.PAUSING
        command = renew_lease(run.pk, 1)
        assert command and command.desired == "pause"
        assert end(run, "paused", "stopped").state == State.PAUSED
        assert resume(run.pk, by="user:ada").state == State.QUEUED
        assert again(run).attempt == 2

    def test_resumed_while_its_supervisor_was_already_stopping(self) -> None:
        run = running()
        pause(run.pk, by="user:ada")
        assert resume(run.pk, by="user:ada").state == State.RUNNING
        assert end(run, "paused", "stopped").state == State.QUEUED

    def test_a_fenced_attempt_has_no_say(self) -> None:
        first = running()
        end(first, "failed", "rank_killed")
        second = again(first)
        end_attempt(first.pk, 1, RunEnded(at=3.0, outcome="succeeded"))
        assert Run.objects.get(pk=first.pk).state == second.state == State.STARTING


class TestThreeStrikes:
    def test_three_attempts_without_a_checkpoint_are_enough(self) -> None:
        run = running()
        for attempt in (1, 2):
            run = end(run, "failed", "rank_killed")
            assert (run.state, run.attempts_without_progress) == (State.QUEUED, attempt)
            run = again(run)
        run = end(run, "failed", "rank_killed", detail="signal 9")
        assert (run.state, run.reason) == (State.FAILED, "restart_limit")
        assert "3 attempts" in run.detail and "rank_killed" in run.detail and "signal 9" in run.detail

    def test_a_new_checkpoint_wipes_the_slate(self) -> None:
        run = running()
        for step in range(1, 8):
            record_checkpoint(run.pk, run.attempt, saved(step))
            run = again(end(run, "failed", "rank_killed"))
        assert run.attempt == 8

    def test_an_old_checkpoint_again_is_no_progress(self) -> None:
        run = running()
        record_checkpoint(run.pk, 1, saved(10))
        for _ in range(2):
            run = again(end(run, "failed", "hang"))
            record_checkpoint(run.pk, run.attempt, saved(10))
        assert end(run, "failed", "hang").reason == "restart_limit"

    def test_a_worker_that_is_shut_down_is_not_counted(self) -> None:
        run = running()
        for _ in range(5):
            run = again(end(run, "paused", "worker_stopping"))
        assert run.attempts_without_progress == 0


class TestCheckpoints:
    def test_twice_is_once_and_the_oldest_go_as_on_disk(self) -> None:
        run = running()
        for step in (1, 2, 2, 3, 4, 5):
            record_checkpoint(run.pk, 1, saved(step))
        rows = {row.step: row.deleted for row in Checkpoint.objects.filter(run=run)}
        assert rows == {1: True, 2: True, 3: False, 4: False, 5: False}, "keep_checkpoints is 3"

    def test_a_later_attempts_checkpoint_of_the_same_step_replaces_the_earlier(self) -> None:
        run = running()
        record_checkpoint(run.pk, 1, saved(5))
        run = again(end(run, "failed", "hang"))
        record_checkpoint(run.pk, 2, saved(5))
        assert list(Checkpoint.objects.filter(run=run, deleted=False).values_list("attempt", "step")) == [(2, 5)]

    def test_asked_for_now(self) -> None:
        run = running()
        checkpoint_now(run.pk)
        checkpoint_now(run.pk)
        command = renew_lease(run.pk, 1)
        assert command and command.checkpoint_requests == 2
        cancel(run.pk, by="user:ada")
        with pytest.raises(StateConflict, match="cannot save a checkpoint"):
            checkpoint_now(run.pk)


class TestRecordedRuns:
    def test_they_take_an_editors_ingest_token_and_nothing_else(self) -> None:
        ada, vic = people.ada(), people.user("vic", Project.default(), Role.VIEWER)
        run = record(user=ada, project=Project.default(), name="theirs")
        good = issue(user=ada, name="i", scopes=["ingest"]).secret
        grant = authenticate_ingest(run.pk, 0, good)
        assert grant and grant.is_recorder
        assert authenticate_ingest(run.pk, 1, good) is None
        assert authenticate_ingest(run.pk, 0, issue(user=ada, name="w", scopes=["admin"]).secret) is None
        assert authenticate_ingest(run.pk, 0, issue(user=vic, name="v", scopes=["ingest"]).secret) is None
        elsewhere = Project.objects.create(name="elsewhere")
        assert authenticate_ingest(run.pk, 0, issue(user=ada, name="e", scopes=["ingest"], project=elsewhere).secret) is None
        assert authenticate_ingest(people.queued().pk, 0, good) is None, "not for runs that workers make"
        revoke_named(user=ada, name="i")
        assert authenticate_ingest(run.pk, 0, good) is None

    @pytest.mark.parametrize(
        ("outcome", "state"), [("succeeded", "succeeded"), ("failed", "failed"), ("cancelled", "cancelled"), ("paused", "cancelled")]
    )
    def test_nobody_takes_their_work_and_their_end_is_final(self, outcome: str, state: str) -> None:
        run = record(user=people.ada(), project=Project.default(), name="theirs")
        assert claim(Run.objects.all(), worker=people.worker(), free_slots=1, free_devices=["cpu:0"]) is None
        start_attempt(run.pk, 0, RunStarted(attempt=0, at=1.0))
        assert end(Run.objects.get(pk=run.pk), outcome, "rank_killed").state == state

    def test_their_lease_binds_nobody_and_they_cannot_be_paused(self) -> None:
        run = record(user=people.ada(), project=Project.default(), name="theirs")
        assert renew_lease(run.pk, 0)
        Run.objects.filter(pk=run.pk).update(lease_until=after_now(-1000))
        with pytest.raises(StateConflict, match="outside trainer"):
            pause(run.pk, by="user:ada")
        assert cancel(run.pk, by="user:ada").state == State.STOPPING
