"""`moelab …` and `moelab.Recorder` against the running product, as a user has them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from moelab import ApiError, Recorder, ServerUnreachable
from tests.end_to_end.chaos.conftest import PROJECT, Lab, assert_undisturbed

pytestmark = [pytest.mark.chaos]


def moelab(lab: Lab, *arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return python(lab, "-m", "moelab.cli", *arguments, stdin=stdin, **env)


def python(lab: Lab, *arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "MOELAB_HOME": str(lab.home), "PYTHONPATH": str(PROJECT)} | env
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, input=stdin, timeout=90, cwd=lab.home)


def test_submit_follow_show_logs_and_export(lab: Lab) -> None:
    done = moelab(lab, "submit", "nano-mixtral", "--set", "training.steps=20", "--name", "by hand", "--tag", "cli", "--follow")
    assert done.returncode == 0, done.stderr
    assert "step 20 \\x1b[31mred" in done.stdout
    run_id = int(done.stdout.split()[1])
    assert f"run {run_id} succeeded at step 20 of 20" in done.stderr
    assert_undisturbed(lab, run_id, 20)
    listed = json.loads(moelab(lab, "ps", "--tag", "cli", "--json").stdout)
    assert [run["id"] for run in listed] == [run_id]
    assert f"{run_id}  succeeded  by hand" in moelab(lab, "ps").stdout
    assert "by hand" in moelab(lab, "show", str(run_id)).stdout
    assert moelab(lab, "logs", str(run_id)).stdout == (lab.home / f"runs/{run_id}/attempts/1/log.txt").read_text()
    assert moelab(lab, "export", str(run_id), "metrics.csv", "-o", "m.csv").returncode == 0
    assert len((lab.home / "m.csv").read_text().splitlines()) == 21
    clone = moelab(lab, "clone", str(run_id), "--set", "training.steps=5", "--json")
    made = json.loads(clone.stdout)
    assert (made["parent"], made["steps"]) == (run_id, 5)
    assert moelab(lab, "wait", str(made["id"])).returncode == 0


def test_a_spec_on_standard_input_and_a_run_that_is_cancelled(lab: Lab) -> None:
    spec = moelab(lab, "presets", "nano-mixtral").stdout.replace("steps: ", "steps: 9", 1)
    made = json.loads(moelab(lab, "submit", "-", "--set", "training.steps=5000", "--json", stdin=spec).stdout)
    assert moelab(lab, "cancel", str(made["id"])).returncode == 0
    assert moelab(lab, "wait", str(made["id"])).returncode == 130


def test_what_the_server_refuses_is_told_at_its_field(lab: Lab) -> None:
    refused = moelab(lab, "submit", "nano-mixtral", "--set", "model.moe.top_k=99")
    assert refused.returncode == 4
    assert "top_k 99 > n_experts 8" in refused.stderr
    assert moelab(lab, "show", "999999").returncode == 4
    assert moelab(lab, "submit", "mixtral-8x7b").returncode == 4, "too large to train here"


def test_the_same_idempotency_key_makes_one_run(lab: Lab) -> None:
    ask = {"preset": "nano-mixtral", "overrides": {"training.steps": 3}, "idempotency_key": "only-once"}
    assert lab.client.submit(**ask)["id"] == lab.client.submit(**ask)["id"]
    with pytest.raises(ApiError) as refused:
        lab.client.submit(**ask | {"overrides": {"training.steps": 4}})
    assert refused.value.status == 422


def test_a_run_that_begins_from_another_runs_checkpoint(lab: Lab) -> None:
    first = lab.submit("first half", steps=20)
    assert lab.end(first)["state"] == "succeeded"
    overrides = {"training.steps": 30}
    second = lab.client.submit(preset="nano-mixtral", overrides=overrides, name="second half", resume_from={"run": first, "step": 20})["id"]
    run = lab.end(second)
    assert (run["state"], run["resumed_from_step"], run["last_step"]) == ("succeeded", 20, 30)
    assert lab.steps(second).arrays["step"].tolist() == list(range(21, 31))


@pytest.fixture
def token(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> str:
    """A token for recording, which is in the environment of this process too, with the lab's home."""
    made = str(lab.client.create_token("a recorder", ["read", "write", "ingest"])["secret"])
    for name, value in {"MOELAB_HOME": str(lab.home), "MOELAB_SERVER": lab.client.server, "MOELAB_TOKEN": made}.items():
        monkeypatch.setenv(name, value)
    return made


COUNTS = np.arange(12, dtype=np.int64).reshape(3, 4)


def test_a_recorded_run_arrives_whole(lab: Lab, token: str) -> None:
    with Recorder("outside", moe_layers=[1, 3, 5], n_experts=4, top_k=2, tags=["recorded"]) as recorder:
        for step in range(1, 31):
            recorder.log(step, {"loss": 1 / step} | ({"late": 2.0} if step > 10 else {}), expert_tokens=COUNTS + step)
    run = lab.client.run(recorder.run or 0)
    assert (run["state"], run["last_step"], run["moe_layers"], run["experts"]) == ("succeeded", 30, [1, 3, 5], 4)
    found = lab.steps(run["id"])
    np.testing.assert_array_equal(found.arrays["expert_tokens"], np.stack([COUNTS + step for step in range(1, 31)]))
    np.testing.assert_array_equal(found.scalar("loss"), (1 / np.arange(1, 31)).astype(np.float32))
    assert np.isnan(found.scalar("late")[:10]).all() and (found.scalar("late")[10:] == 2).all()
    assert not list(lab.home.glob("recordings/*"))


def test_a_recording_bears_the_servers_death_and_sync_ships_the_rest(lab: Lab, token: str) -> None:
    script = """
import os, signal, sys
from moelab import Recorder
recorder = Recorder("died", moe_layers=[0], n_experts=2, top_k=1)
for step in range(1, 11):
    recorder.log(step, {"loss": float(step)}, expert_tokens=[[step, 1]])
print("logged", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    os.kill(lab.up.pid, signal.SIGSTOP)  # nobody starts the server again for now
    try:
        web = lab.child("uvicorn")
        web.kill()
        died = python(lab, "-c", script, MOELAB_TOKEN=token)
        assert died.stdout == "logged\n", died.stderr
        assert died.returncode == -signal.SIGKILL
    finally:
        os.kill(lab.up.pid, signal.SIGCONT)
    lab.wait(lambda: _answers(lab), 30)
    synced = moelab(lab, "spool", "sync", MOELAB_TOKEN=token)
    assert synced.returncode == 0, synced.stderr
    run = next(lab.client.runs(q="died", limit=1))
    assert (run["state"], run["reason"], run["last_step"]) == ("failed", "recorder_lost", 10)
    assert lab.steps(run["id"]).arrays["expert_tokens"][:, 0, 0].tolist() == list(range(1, 11))
    assert not list(lab.home.glob("recordings/*"))


def _answers(lab: Lab) -> bool:
    with contextlib.suppress(ServerUnreachable):
        return bool(lab.client.me())
    return False
