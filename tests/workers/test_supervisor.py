"""One attempt from its claim to its end: real processes, a real socket, a trainer without a model."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from spec import events, spool
from tests.workers import fake_trainer
from tests.workers.conftest import Host
from workers import host


def kill_hard(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_run_is_trained_shipped_and_told_to_have_succeeded(worker_host: Host) -> None:
    worker_host.launch(steps=12)
    worker_host.wait_until_quiet()
    server = worker_host.server
    assert server.steps() == list(range(1, 13))
    for event in server.events():
        if isinstance(event, events.StepDone):
            np.testing.assert_array_equal(event.scalars, fake_trainer.scalars(event.step))
            np.testing.assert_array_equal(event.tensors["expert_tokens"], fake_trainer.expert_tokens(event.step))
    ended = server.events()[-1]
    assert isinstance(ended, events.RunEnded)
    assert (ended.outcome, ended.reason, ended.exit_code) == ("succeeded", "finished", 0)
    assert ended.log_tail.rstrip().endswith("step 12 \\x1b[31mred\\x1b[0m")
    assert server.log[1] == (worker_host.attempt_dir() / "log.txt").read_bytes()
    assert not (worker_host.attempt_dir() / "attempt.lock").exists()


def test_what_another_servers_run_of_that_number_left_is_put_aside(worker_host: Host) -> None:
    left = worker_host.attempt_dir() / "events.spool"
    with spool.Writer(left) as writer:
        writer.append(events.encode(events.RunStarted(attempt=1, at=1.0, steps=99)))
        writer.append(events.encode(events.RunEnded(at=2.0, outcome="succeeded")))
    (worker_host.home / "runs" / "1" / "checkpoints" / "step-00000099").mkdir(parents=True)
    worker_host.launch(steps=5)
    worker_host.wait_until_quiet()
    assert worker_host.server.steps() == [1, 2, 3, 4, 5]
    assert [type(event).__name__ for event in worker_host.server.events()].count("RunEnded") == 1
    (aside,) = (worker_host.home / "runs").glob("1.before-*")
    assert (aside / "attempts" / "1" / "events.spool").exists() and (aside / "checkpoints" / "step-00000099").exists()


def test_the_caller_is_let_go_at_once_and_no_secret_reaches_the_trainer(worker_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_TOKEN", "mlk_canary")
    monkeypatch.setenv("DATABASE_URL", "postgresql://canary")
    holder = worker_host.launch(steps=1000)
    supervisor, rank = (next(p for p in worker_host.processes() if p.pid == pid) for pid in (holder.supervisor[0], holder.ranks[0][0]))
    assert supervisor.ppid() != os.getpid()
    assert os.getsid(supervisor.pid) not in (os.getsid(0), os.getsid(rank.pid))
    assert rank.ppid() == supervisor.pid
    assert "canary" not in str(rank.environ())
    assert not any(worker_host.server.token in part for process in worker_host.processes() for part in process.cmdline())
    kill_hard(supervisor.pid)
    worker_host.wait_until_quiet(2)


@pytest.mark.parametrize(
    ("exit_at", "reason"), [("3:64", "config_invalid"), ("3:70", "error"), ("3:71", "oom"), ("3:74", "disk_full"), ("3:76", "nan_loss")]
)
def test_the_exit_code_becomes_the_reason(worker_host: Host, monkeypatch: pytest.MonkeyPatch, exit_at: str, reason: str) -> None:
    monkeypatch.setenv("FAKE_EXIT_AT", exit_at)
    monkeypatch.setenv("FAKE_STEP_S", "0")
    worker_host.launch(steps=100)
    ended = worker_host.wait(worker_host.server.ended)
    assert (ended.outcome, ended.reason, ended.exit_code) == ("failed", reason, int(exit_at[2:]))
    assert ended.detail == "told to exit at step 3"
    assert worker_host.server.steps() == [1, 2, 3]


def test_a_killed_rank_takes_the_others_with_it(worker_host: Host) -> None:
    holder = worker_host.launch(steps=1000, ranks=2)
    worker_host.wait(worker_host.server.steps)
    kill_hard(holder.ranks[1][0])
    ended = worker_host.wait(worker_host.server.ended)
    assert (ended.outcome, ended.reason, ended.signal) == ("failed", "rank_killed", 9)
    assert ended.detail == "rank 1 was ended by SIGKILL"
    worker_host.wait_until_quiet()


LAST_WORDS = (
    "[PG ID 0 Rank 1] Process group watchdog thread terminated with exception: NCCL error: remote process exited or there was a network error"
)


@pytest.mark.parametrize(("exit_at", "reason", "signal_"), [("3:71", "oom", None), ("3:75", "peer_lost", signal.SIGABRT)])
def test_a_rank_that_torch_aborts_has_lost_a_peer(
    worker_host: Host, monkeypatch: pytest.MonkeyPatch, exit_at: str, reason: str, signal_: int | None
) -> None:
    """Its process ends by SIGABRT, in the same moment as the rank whose end is the reason, if that has one."""
    monkeypatch.setenv("FAKE_EXIT_AT", exit_at)
    monkeypatch.setenv("FAKE_LAST_WORDS", LAST_WORDS)
    worker_host.launch(steps=100, ranks=2)
    ended = worker_host.wait(worker_host.server.ended)
    assert (ended.outcome, ended.reason, ended.signal) == ("failed", reason, signal_)
    assert LAST_WORDS in ended.log_tail
    assert (ended.detail == f"rank 1 has lost another rank: {LAST_WORDS}") == (reason == "peer_lost")
    worker_host.wait_until_quiet()


def test_a_rank_that_aborts_for_another_reason_was_killed(worker_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_EXIT_AT", "3:75")
    monkeypatch.setenv("FAKE_LAST_WORDS", "double free or corruption (!prev)")
    worker_host.launch(steps=100, ranks=2)
    ended = worker_host.wait(worker_host.server.ended)
    assert (ended.reason, ended.detail) == ("rank_killed", "rank 1 was ended by SIGABRT")


def test_a_killed_supervisor_leaves_nobody_behind_and_the_next_attempt_completes_the_series(worker_host: Host) -> None:
    server = worker_host.server
    holder = worker_host.launch(steps=40)
    worker_host.wait(lambda: len(server.steps()) > 14)
    kill_hard(holder.supervisor[0])
    worker_host.wait_until_quiet(2)
    worker_host.wait(lambda: host.living(worker_host.home) == [], 2)
    worker_host.launch(steps=40, attempt=2)
    worker_host.wait_until_quiet()
    started = server.events(2)[0]
    assert isinstance(started, events.RunStarted)
    assert started.resumed_from_step is not None and started.resumed_from_step >= 10
    assert server.steps(2) == list(range(started.resumed_from_step + 1, 41))
    with spool.Reader(worker_host.attempt_dir(attempt=1) / "events.spool") as reader:
        assert server.records[1] == [payload for _, payload in reader.read()]
    assert server.ended(1) is None
    assert server.ended(2) is not None


def test_an_attempt_that_was_replaced_is_ended_before_the_next_one_trains(worker_host: Host) -> None:
    old = worker_host.launch(steps=5000)
    worker_host.launch(steps=20, attempt=2)
    alive = {process.pid for process in worker_host.processes()}
    assert not alive & {old.supervisor[0], old.ranks[0][0]}
    worker_host.wait_until_quiet()
    assert worker_host.server.ended(2) is not None


def test_fenced_means_gone_without_a_word(worker_host: Host) -> None:
    worker_host.launch(steps=5000)
    worker_host.wait(worker_host.server.steps)
    worker_host.server.fence()
    worker_host.wait_until_quiet(5)
    assert worker_host.server.ended() is None


def test_a_token_that_is_no_longer_known_is_an_answer_too(worker_host: Host) -> None:
    worker_host.launch(steps=5000)
    worker_host.wait(worker_host.server.steps)
    worker_host.server.token = "mlr_another"
    worker_host.server.stop()
    worker_host.server.start()
    worker_host.wait_until_quiet(30)
    assert worker_host.server.ended() is None


@pytest.mark.parametrize(("desired", "outcome"), [("cancel", "cancelled"), ("pause", "paused")])
def test_cancel_and_pause_save_a_checkpoint_and_end_within_three_seconds(worker_host: Host, desired: str, outcome: str) -> None:
    worker_host.launch(steps=5000)
    worker_host.wait(worker_host.server.steps)
    asked = time.monotonic()
    worker_host.server.command(desired)
    ended = worker_host.wait(worker_host.server.ended)
    worker_host.wait_until_quiet()
    assert time.monotonic() - asked < 3
    assert (ended.outcome, ended.reason, ended.exit_code) == (outcome, outcome, 75)
    saved = [event.step for event in worker_host.server.events() if isinstance(event, events.CheckpointSaved)]
    assert saved[-1] == worker_host.server.steps()[-1]


def test_ranks_that_ignore_sigterm_are_killed_after_ten_seconds(worker_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_IGNORE_SIGTERM", "1")
    monkeypatch.setenv("FAKE_CHILD", "1")
    worker_host.launch(steps=5000)
    worker_host.wait(worker_host.server.steps)
    asked = time.monotonic()
    worker_host.server.command("cancel")
    ended = worker_host.wait(worker_host.server.ended)
    worker_host.wait_until_quiet()
    assert 10 <= time.monotonic() - asked < 13
    assert (ended.outcome, ended.signal) == ("cancelled", 9)
    assert "did not stop in time" in ended.detail


def test_a_checkpoint_is_saved_on_request_and_training_goes_on(worker_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CHECKPOINT_EVERY", "0")
    server = worker_host.server
    worker_host.launch(steps=60)
    worker_host.wait(server.steps)
    server.command(checkpoint_requests=1)
    worker_host.wait_until_quiet()
    saved = [event.step for event in server.events() if isinstance(event, events.CheckpointSaved)]
    assert len(saved) == 2 and saved[0] < saved[1] == 60
    assert server.steps() == list(range(1, 61))


def test_a_hang_is_ended_with_the_stacks_in_the_log(worker_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_HANG_AT", "5")
    monkeypatch.setenv("MOELAB_STEP_TIMEOUT_S", "1")
    worker_host.launch(steps=5000)
    ended = worker_host.wait(worker_host.server.ended)
    assert (ended.outcome, ended.reason) == ("failed", "hang")
    assert "fake_trainer.py" in ended.log_tail and "in run" in ended.log_tail
    worker_host.wait_until_quiet()


def test_a_stopped_rank_is_a_hang_too(worker_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_STEP_TIMEOUT_S", "1")
    holder = worker_host.launch(steps=5000)
    worker_host.wait(worker_host.server.steps)
    os.kill(holder.ranks[0][0], signal.SIGSTOP)
    assert worker_host.wait(worker_host.server.ended).reason == "hang"
    worker_host.wait_until_quiet()


def test_the_host_going_down_leaves_the_run_to_be_continued(worker_host: Host) -> None:
    holder = worker_host.launch(steps=5000)
    worker_host.wait(worker_host.server.steps)
    assert host.running_supervisors(worker_host.home) == [holder.supervisor[0]]
    os.kill(holder.supervisor[0], signal.SIGTERM)
    ended = worker_host.wait(worker_host.server.ended)
    worker_host.wait_until_quiet()
    assert (ended.outcome, ended.reason, ended.exit_code) == ("paused", "worker_stopped", 75)


def test_a_trainer_that_cannot_start_has_failed_with_its_own_words(worker_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_TRAINER", "tests.workers.no_such_trainer")
    launched = worker_host.claim()
    from workers.launch import launch

    launch(launched, worker_host.home / "runs")
    ended = worker_host.wait(worker_host.server.ended)
    assert (ended.outcome, ended.reason, ended.exit_code) == ("failed", "error", 1)
    assert "No module named tests.workers.no_such_trainer" in ended.detail
