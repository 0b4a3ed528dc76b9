"""`moelab up` as a user starts it, in a home of its own, and the means to hurt it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from moelab.client import ApiError, Client, ServerUnreachable, Steps
from tests.workers import fake_trainer
from workers import host

PROJECT = Path(__file__).resolve().parents[3]
STEP_S = 0.045


class Lab:
    """A running stack, its client, and its processes."""

    def __init__(self, home: Path, up: subprocess.Popen[bytes]) -> None:
        self.home, self.up = home, up
        found = json.loads((home / "client.json").read_text())
        self.client = Client(found["server"], found["token"])

    # ----- processes

    def child(self, *words: str) -> psutil.Process:
        """The process that `moelab up` started with all of `words` in its command line; one that has just died is started again."""

        def look() -> psutil.Process | None:
            for process in psutil.Process(self.up.pid).children():
                with contextlib.suppress(psutil.Error):
                    if all(word in " ".join(process.cmdline()) for word in words):
                        return process
            return None

        found: psutil.Process = self.wait(look, 30)
        return found

    def holder(self, run_id: int) -> host.Holder:
        """Who trains the run now, once its ranks are there."""
        return self.wait(lambda: next((found for found in host.living(self.home) if found.run == run_id and found.ranks), None), 30)

    def pid_of(self, victim: str, run_id: int) -> int:
        """The process to kill."""
        if victim == "rank":
            return self.holder(run_id).ranks[0][0]
        if victim == "supervisor":
            return self.holder(run_id).supervisor[0]
        words = {"worker": "moelab.cli worker", "web": "uvicorn", "valkey": "valkey-server", "postgres": "bin/postgres -D", "beat": "moelab.cli beat"}
        return self.child(words[victim]).pid

    def of_run(self, run_id: int) -> list[psutil.Process]:
        """Everything alive that names the run's directory in its command line: its supervisor and its ranks."""
        wanted, found = str(self.home / "runs" / str(run_id)), []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if wanted in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    # ----- runs

    def submit(self, name: str, *, steps: int = 150, **overrides: Any) -> int:
        changes = {"training.steps": steps, **overrides}
        return int(self.client.submit(preset="nano-mixtral", overrides=changes, name=name)["id"])

    def last_step(self, run_id: int) -> int:
        """The newest step in the store; 0 while the server is away."""
        try:
            return int(self.client.run(run_id)["last_step"])
        except (ServerUnreachable, ApiError):
            return 0

    def wait_for_step(self, run_id: int, step: int, timeout_s: float = 60.0) -> None:
        self.wait(lambda: self.last_step(run_id) >= step, timeout_s)

    def end(self, run_id: int, timeout_s: float = 120.0) -> dict[str, Any]:
        """The run once it has ended and nothing of it is left alive."""
        run = self.client.wait(run_id, timeout_s=timeout_s)
        self.wait(lambda: not self.of_run(run_id), 5)
        return run

    def steps(self, run_id: int) -> Steps:
        return self.client.steps(run_id, points=2000, tensors=["expert_tokens"])

    def wait(self, what: Callable[[], Any], timeout_s: float) -> Any:
        """The first true value of `what()`. Fails after `timeout_s` with the ends of all logs."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := what():
                return value
            time.sleep(0.05)
        raise AssertionError(f"not within {timeout_s} s\n{self.logs()}")

    def logs(self) -> str:
        paths = [*self.home.glob("log/*.log"), *self.home.glob("runs/*/attempts/*/supervisor.log")]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in paths)


def assert_undisturbed(lab: Lab, run_id: int, steps: int) -> None:
    """The store has each step once, with the values that an undisturbed run of the fake trainer reports."""
    header, arrays = lab.steps(run_id)
    assert header["level"] == 1
    np.testing.assert_array_equal(arrays["step"], np.arange(1, steps + 1))
    assert header["names"] == fake_trainer.NAMES
    np.testing.assert_array_equal(arrays["scalars"], np.stack([fake_trainer.scalars(step) for step in range(1, steps + 1)]))
    np.testing.assert_array_equal(arrays["expert_tokens"], np.stack([fake_trainer.expert_tokens(step) for step in range(1, steps + 1)]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


NOT_OURS = ("DATABASE_URL", "REDIS_URL", "DJANGO_SETTINGS_MODULE", "MOELAB_SECRET_KEY", "MOELAB_SERVER", "MOELAB_TOKEN")


@pytest.fixture(scope="package")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    home = Path(tempfile.mkdtemp(prefix="moelab-chaos-"))
    home.chmod(0o755)  # PostgreSQL, started by root, runs as another account and must reach its data below
    env = {name: value for name, value in os.environ.items() if name not in NOT_OURS} | {
        "MOELAB_HOME": str(home), "MOELAB_TRAINER": "tests.end_to_end.chaos.either_trainer", "PYTHONPATH": str(PROJECT),
        "FAKE_STEP_S": str(STEP_S), "FAKE_CHECKPOINT_EVERY": "20", "OMP_NUM_THREADS": "1", "MOELAB_SLOTS": "2",
    }  # fmt: skip
    log = (home / "up.log").open("wb")
    up = subprocess.Popen([sys.executable, "-m", "moelab.cli", "up", "--port", str(free_port())], env=env, stdout=log, stderr=log, cwd=PROJECT)
    deadline = time.monotonic() + 60
    while b"moelab is up" not in (home / "up.log").read_bytes():
        assert up.poll() is None and time.monotonic() < deadline, (home / "up.log").read_text()
        time.sleep(0.1)
    yield Lab(home, up)
    up.send_signal(signal.SIGTERM)
    up.wait(40)
    left = [process for process in psutil.process_iter() if _lives_in(process, home)]
    for process in left:
        process.kill()
    if request.session.testsfailed:
        print(f"the home of the failed tests is kept: {home}")
    else:
        shutil.rmtree(home, ignore_errors=True)
    assert not left, "moelab up left processes behind"


def _lives_in(process: psutil.Process, home: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return str(home) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    return False
