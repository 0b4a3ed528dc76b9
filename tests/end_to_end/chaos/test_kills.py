"""kill -9 of each part while a run trains: it ends as if nothing had happened, each step once, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from tests.end_to_end.chaos.conftest import Lab, assert_undisturbed

pytestmark = [pytest.mark.chaos]
STEPS = 150
TINY = {
    "training.checkpoint_every": 5, "training.eval_every": 20, "training.eval_batches": 1, "training.batch_size": 2, "data.seq_len": 64,
    "model.n_layers": 2, "model.d_model": 64, "model.moe.d_expert": 64, "model.d_ff": 128, "parallel.threads": 1,
}  # fmt: skip
TINY_STEPS = 60


@pytest.fixture(scope="module")
def undisturbed(lab: Lab) -> tuple[np.ndarray, np.ndarray]:
    """(lm_loss, expert_tokens) of the real trainer when nobody disturbs it."""
    run_id = lab.submit("real undisturbed", steps=TINY_STEPS, **TINY)
    assert lab.end(run_id, 180)["state"] == "succeeded"
    found = lab.steps(run_id)
    return found.scalar("lm_loss"), found.arrays["expert_tokens"]


@pytest.mark.parametrize("victim", ["rank", "supervisor", "worker", "web", "valkey", "postgres"])
def test_runs_survive_the_death_of(lab: Lab, undisturbed: tuple[np.ndarray, np.ndarray], victim: str) -> None:
    """Two runs at once: a fast one without a model, and a real model, which must end up bit-identical."""
    fast = lab.submit(f"kill {victim}", steps=STEPS)
    real = lab.submit(f"real, kill {victim}", steps=TINY_STEPS, **TINY)
    for run_id, step in ((fast, 30), (real, 8)):  # what both share is killed twice
        lab.wait_for_step(run_id, step)
        os.kill(lab.pid_of(victim, run_id), signal.SIGKILL)
    for run_id, steps in ((fast, STEPS), (real, TINY_STEPS)):
        run = lab.end(run_id)
        assert (run["state"], run["last_step"]) == ("succeeded", steps)
        assert run["attempt"] == (2 if victim in ("rank", "supervisor") else 1), "training stops only where training was hit"
    assert_undisturbed(lab, fast, STEPS)
    found = lab.steps(real)
    np.testing.assert_array_equal(found.arrays["step"], np.arange(1, TINY_STEPS + 1))
    np.testing.assert_array_equal(found.scalar("lm_loss"), undisturbed[0])
    np.testing.assert_array_equal(found.arrays["expert_tokens"], undisturbed[1])


def test_a_killed_worker_comes_back_and_takes_the_next_run(lab: Lab) -> None:
    os.kill(lab.child("moelab.cli worker").pid, signal.SIGKILL)
    run_id = lab.submit("after the worker's death", steps=20)
    assert lab.end(run_id)["state"] == "succeeded"


def test_a_run_submitted_while_the_bell_is_dead_is_accepted_at_once_and_starts_later(lab: Lab) -> None:
    valkey = lab.child("valkey-server").pid
    os.kill(valkey, signal.SIGSTOP)
    try:
        took = []
        for name in ("silent bell 1", "silent bell 2"):
            began = time.monotonic()
            run_id = lab.submit(name, steps=20)
            took.append(time.monotonic() - began)
    finally:
        os.kill(valkey, signal.SIGCONT)
    assert max(took) < 2.0
    assert lab.end(run_id)["state"] == "succeeded"
    os.kill(lab.up.pid, signal.SIGSTOP)  # nobody starts it again for now
    try:
        os.kill(valkey, signal.SIGKILL)
        began = time.monotonic()
        run_id = lab.submit("dead bell", steps=20)
        assert time.monotonic() - began < 2.0
    finally:
        os.kill(lab.up.pid, signal.SIGCONT)
    assert lab.end(run_id)["state"] == "succeeded"


def test_cancel_ends_every_process_of_the_run(lab: Lab) -> None:
    run_id = lab.submit("to be cancelled", steps=5000)
    lab.wait_for_step(run_id, 5)
    assert lab.of_run(run_id)
    began = time.monotonic()
    lab.client.cancel(run_id)
    run = lab.end(run_id, 20)
    assert run["state"] == "cancelled"
    assert time.monotonic() - began < 6


def test_pause_and_resume_go_on_where_it_stopped(lab: Lab) -> None:
    run_id = lab.submit("paused once", steps=80)
    lab.wait_for_step(run_id, 10)
    lab.client.pause(run_id)
    lab.wait(lambda: lab.client.run(run_id)["state"] == "paused", 20)
    stopped_at = lab.client.run(run_id)["last_step"]
    lab.wait(lambda: not lab.of_run(run_id), 5)
    lab.client.resume(run_id)
    run = lab.end(run_id)
    assert run["state"] == "succeeded"
    assert run["resumed_from_step"] == stopped_at
    assert_undisturbed(lab, run_id, 80)
