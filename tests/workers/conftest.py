"""A host with its own MOELAB_HOME, a server to ship to, and the supervisors that tests start there."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.workers.ingest_server import IngestServer
from workers import host
from workers.launch import launch

PROJECT = Path(__file__).resolve().parents[2]


class Host:
    """A worker host under test. `claim` is what the server would hand out."""

    def __init__(self, home: Path, server: IngestServer) -> None:
        self.home, self.server = home, server

    def claim(self, *, run: int = 1, attempt: int = 1, steps: int = 10, ranks: int = 1) -> dict[str, Any]:
        return {
            "run": run, "attempt": attempt, "token": self.server.token, "spec": {"training": {"steps": steps}, "parallel": {}},
            "devices": ["cpu:0"] * ranks, "ingest_url": f"/ws/ingest/{run}/", "lease_s": 15, "heartbeat_s": 3,
        }  # fmt: skip

    def launch(self, **fields: Any) -> host.Holder:
        """Starts a supervisor and returns who holds the attempt, once its ranks are there."""
        claim = self.claim(**fields)
        launch(claim, self.home / "runs")
        lock = self.attempt_dir(claim["run"], claim["attempt"]) / "attempt.lock"
        return self.wait(lambda: (found := host.read(lock)) and found.ranks and found)

    def attempt_dir(self, run: int = 1, attempt: int = 1) -> Path:
        return self.home / "runs" / str(run) / "attempts" / str(attempt)

    def processes(self) -> list[psutil.Process]:
        """Everything alive that belongs to this host: whatever has its MOELAB_HOME in its environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("MOELAB_HOME") == str(self.home) and process.pid != os.getpid()
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def running(self, word: str) -> list[psutil.Process]:
        """Those with `word` among their arguments."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if word in process.cmdline():
                    found.append(process)
        return found

    def wait(self, what: Callable[[], Any], timeout_s: float = 20.0) -> Any:
        """The first true value of `what()`. Fails after `timeout_s` with the supervisors' logs."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := what():
                return value
            time.sleep(0.02)
        logs = "\n".join(path.read_text()[-2000:] for path in self.home.glob("runs/*/attempts/*/*.log"))
        raise AssertionError(f"not within {timeout_s} s; steps {self.server.steps()[-3:]}, problems {self.server.problems}\n{logs}")

    def wait_until_quiet(self, timeout_s: float = 20.0) -> None:
        """Waits until no process of this host is left."""
        self.wait(lambda: not self.processes(), timeout_s)


@pytest.fixture
def server() -> Iterator[IngestServer]:
    running = IngestServer().start()
    yield running
    running.stop()
    assert not running.problems


@pytest.fixture
def worker_host(tmp_path: Path, server: IngestServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    monkeypatch.setenv("MOELAB_SERVER", server.url)
    monkeypatch.setenv("MOELAB_TRAINER", "tests.workers.fake_trainer")
    monkeypatch.setenv("FAKE_STEP_S", "0.02")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    running = Host(tmp_path, server)
    yield running
    for process in running.processes():
        with contextlib.suppress(psutil.Error):
            os.kill(process.pid, signal.SIGKILL)
