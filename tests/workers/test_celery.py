"""The Celery side: what is configured, that it takes work over a real broker, and that runs outlive it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import Celery

from moelab.redis_url import celery_broker
from tests.workers.conftest import PROJECT, Host
from workers import canary
from workers.app import app
from workers.tenant import sole_worker


def test_the_settings_that_faults_taught() -> None:
    conf = app.conf
    assert conf.accept_content == ["json"] and conf.task_serializer == "json"
    assert conf.result_backend is None and conf.task_ignore_result
    assert conf.task_acks_late is False and conf.worker_prefetch_multiplier == 1
    assert conf.task_time_limit == 30
    assert conf.broker_transport_options["socket_timeout"] == 5
    assert conf.beat_schedule["bell"]["options"] == {"queue": "work", "expires": 10}


class Api(ThreadingHTTPServer):
    """hello and claim of the server, over HTTP: hands out `waiting` once each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.waiting: list[dict[str, Any]] = []
        self.asked: list[tuple[str, dict[str, Any], str]] = []


class Handler(BaseHTTPRequestHandler):
    server: Api

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        runs = self.server.waiting if self.path.endswith("/worker/claim") else []
        answer = {"worker": 7} if self.path.endswith("hello") else runs.pop(0) if runs else None
        data = json.dumps(answer).encode() if answer else b""
        self.send_response(200 if answer else 204)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Api]:
    running = Api()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def celery_worker(worker_host: Host, api: Api, valkey_url: str, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    env = os.environ | {
        "MOELAB_SERVER": f"http://127.0.0.1:{api.server_port}", "MOELAB_TOKEN": "mlk_worker", "REDIS_URL": valkey_url,
        "MOELAB_WORKER_NAME": f"test{os.getpid()}", "MOELAB_SLOTS": "2",
    }  # fmt: skip
    log = (tmp_path / "worker.log").open("wb")
    worker = subprocess.Popen([sys.executable, "-m", "moelab.cli", "worker"], env=env, cwd=PROJECT, stdout=log, stderr=log, start_new_session=True)
    worker_host.wait(lambda: b"ready." in (tmp_path / "worker.log").read_bytes(), 30)
    yield worker
    worker.kill()
    worker.wait()


def ring(url: str) -> None:
    with Celery("bell", broker=celery_broker(url), set_as_current=False) as bell:
        bell.send_task("workers.look_for_work", queue="work", ignore_result=True)


def test_a_bell_starts_what_waits_and_the_runs_outlive_the_killed_worker(
    worker_host: Host, api: Api, celery_worker: subprocess.Popen[bytes], valkey_url: str
) -> None:
    worker_host.wait(lambda: len(api.asked) == 3, 5)
    assert [path.rpartition("/worker/")[2] for path, *_ in api.asked] == ["hello", "claim", "generations/claim"], "a new worker asks unbidden"
    api.asked.clear()
    # Two runs for two slots; the third stays with the server. Their telemetry goes nowhere: this server has no ingest socket.
    api.waiting = [worker_host.claim(run=run, steps=5000) for run in (1, 2, 3)]
    ring(valkey_url)
    ranks = worker_host.wait(lambda: len(found := worker_host.running("tests.workers.fake_trainer")) == 2 and found, 30)
    hello, first, second = api.asked[:3]
    assert hello[0] == "/api/v1/worker/hello" and hello[2] == "Bearer mlk_worker"
    assert (hello[1]["slots"], [device["kind"] for device in hello[1]["devices"]]) == (2, ["cpu", "cpu"])
    assert (first[1]["worker"], first[1]["free_slots"]) == (7, 2)
    assert (second[1]["free_slots"], len(second[1]["free_devices"])) == (1, 1)
    assert [claim["run"] for claim in api.waiting] == [3]
    celery_worker.send_signal(signal.SIGKILL)
    celery_worker.wait()
    time.sleep(1.0)
    assert all(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert not worker_host.running("moelab.cli"), "the pool's child has gone with its parent"


def test_a_second_worker_is_kept_out_of_a_home_until_the_first_has_gone(celery_worker: subprocess.Popen[bytes], worker_host: Host) -> None:
    command = [sys.executable, "-m", "moelab.cli", "worker"]
    second = subprocess.run(command, env=os.environ | {"MOELAB_WORKER_NAME": "second"}, cwd=PROJECT, capture_output=True, text=True, timeout=30)
    assert second.returncode == 1
    words = f"moelab worker: a worker (process {celery_worker.pid}) lives in {worker_host.home} already: set MOELAB_HOME to another directory"
    assert words in second.stderr
    children = psutil.Process(celery_worker.pid).children()
    assert children
    for child in children:
        child.suspend()
    celery_worker.kill()
    celery_worker.wait()
    try:
        with sole_worker(worker_host.home):
            assert (worker_host.home / "worker.pid").read_text() == str(os.getpid()), "a pool's child that outlives its worker holds nothing"
    finally:
        for child in children:
            child.kill()


def test_a_canary_is_deaf_only_when_it_rang_and_nobody_heard(monkeypatch: pytest.MonkeyPatch, valkey_url: str) -> None:
    monkeypatch.setattr(canary, "DEAF_S", 0.05)
    bird = canary.Canary(Celery("test", broker=celery_broker(valkey_url), set_as_current=False), f"nobody-listens-{os.getpid()}")
    assert not bird.deaf
    bird.ring()
    assert not bird.deaf
    time.sleep(0.06)
    assert bird.deaf
    bird.heard()
    assert not bird.deaf


def test_a_dead_broker_does_not_make_a_worker_deaf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(canary, "DEAF_S", 0.05)
    bird = canary.Canary(Celery("test", broker=f"redis+socket://{tmp_path}/nothing?virtual_host=0", set_as_current=False), "queue")
    bird.ring()
    time.sleep(0.06)
    bird.ring()
    assert not bird.deaf
