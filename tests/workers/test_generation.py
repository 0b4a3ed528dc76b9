"""A host that answers generations: which it takes, what becomes of each way to end, and that one process drains the queue."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from moelab.client import Client
from tests.workers.conftest import PROJECT
from workers import generation
from workers.generation import Offer


class Api(ThreadingHTTPServer):
    """The server's side: hands out `waiting`, keeps every answer, and answers heartbeats and answers with the statuses that a test sets."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.waiting: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        self.beats = 0
        self.beat_status, self.answer_statuses = 200, list[int]()


class Handler(BaseHTTPRequestHandler):
    server: Api

    def do_POST(self) -> None:
        body, status, answer = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), 200, {}
        if self.path.endswith("/claim"):
            status, answer = (200, self.server.waiting.pop(0)) if self.server.waiting else (204, {})
        elif self.path.endswith("/heartbeat"):
            self.server.beats += 1
            status = self.server.beat_status
        else:
            status = self.server.answer_statuses.pop(0) if self.server.answer_statuses else 200
            self.server.answers.append({"generation": int(self.path.split("/")[-2]), **body})
        data = b"" if status == 204 else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    running = Api()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    for name, value in {
        "MOELAB_HOME": str(tmp_path), "MOELAB_SERVER": f"http://127.0.0.1:{running.server_port}", "MOELAB_TOKEN": "mlk_worker",
        "MOELAB_GENERATOR": "tests.workers.fake_generator", "PYTHONPATH": str(PROJECT),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def client(api: Api) -> Iterator[Client]:
    with Client() as found:
        yield found


def offered(number: int = 1, prompt: str = "hi", **fields: Any) -> dict[str, Any]:
    """An offer whose checkpoint is in MOELAB_HOME."""
    manifest = Path(os.environ["MOELAB_HOME"]) / "runs" / "3" / "checkpoints" / "step-00000020" / "MANIFEST.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("{}")
    sha256 = hashlib.sha256(b"{}").hexdigest()
    told = {"generation": number, "attempt": 2, "run": 3, "step": 20, "sha256": sha256, "prompt": prompt, "heartbeat_s": 0.2}
    return {**told, "parameters": {"tokens": 5, "temperature": 0.5, "top_p": 1.0}, **fields}


def test_only_the_very_checkpoint_counts_as_here(api: Api, client: Client) -> None:
    api.waiting = [offered(1, run=4), offered(2, step=21), offered(3, sha256="0" * 64), offered(4), offered(5)]
    taken = generation.take(client, 7)
    assert taken is not None and taken.generation == 4
    assert api.answers == [{"generation": number, "attempt": 2, "outcome": "not_here"} for number in (1, 2, 3)]
    api.waiting = []
    assert generation.take(client, 7) is None


def test_the_prompt_goes_through_a_pipe_and_the_token_nowhere(api: Api, client: Client) -> None:
    generation.answer(client, Offer.model_validate(offered(prompt="--héllo\n")))
    (answer,) = api.answers
    said = answer["result"]
    assert (answer["generation"], answer["attempt"], answer["outcome"], said["prompt"]) == (1, 2, "succeeded", "--héllo\n")
    assert said["arguments"][1:5] == ["--step", "20", "--prompt-file", "-"]
    assert said["arguments"][-6:] == ["--tokens", "5", "--temperature", "0.5", "--top-p", "1.0"]
    assert (
        said["environment"]["MOELAB_TOKEN"] is None and said["environment"]["MOELAB_DEVICE"] == "cpu" and int(said["environment"]["MOELAB_THREADS"])
    )
    assert said["nice"] >= 10 and not any("héllo" in argument for argument in said["arguments"])


@pytest.mark.parametrize(
    ("prompt", "outcome", "reason"),
    [
        ("exit 66", "not_here", None),
        ("exit 64", "failed", "config_invalid"),
        ("exit 71", "failed", "oom"),
        ("exit 70", "failed", "error"),
        ("broken", "failed", "error"),
    ],
)
def test_every_end_has_its_answer(api: Api, client: Client, prompt: str, outcome: str, reason: str | None) -> None:
    generation.answer(client, Offer.model_validate(offered(prompt=prompt)))
    assert (api.answers[0]["outcome"], api.answers[0].get("reason")) == (outcome, reason)
    if prompt.startswith("exit") and reason:
        assert api.answers[0]["detail"] == "the last \ufffd[31mline"


def test_one_that_takes_too_long_is_killed_and_was_kept_until_then(api: Api, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "TIMEOUT_S", 1.0)
    generation.answer(client, Offer.model_validate(offered(prompt="sleep")))
    assert api.answers[0]["reason"] == "killed" and "1 s at most" in api.answers[0]["detail"]
    assert api.beats >= 2


def test_one_that_is_no_longer_ours_is_killed_and_nothing_is_said(api: Api, client: Client) -> None:
    api.beat_status = 409
    started = time.monotonic()
    generation.answer(client, Offer.model_validate(offered(prompt="sleep")))
    assert api.answers == [] and time.monotonic() - started < 10
    assert not [child for child in psutil.Process().children() if "fake_generator" in " ".join(child.cmdline())]


def test_a_result_that_the_server_refuses_is_told_as_a_failure(api: Api, client: Client) -> None:
    api.answer_statuses = [422]
    generation.answer(client, Offer.model_validate(offered()))
    assert [answer["outcome"] for answer in api.answers] == ["succeeded", "failed"]
    api.answer_statuses = [409]
    generation.answer(client, Offer.model_validate(offered()))
    assert len(api.answers) == 3, "fenced: nothing more to say"


def test_one_process_drains_the_queue_and_another_does_not_begin_meanwhile(api: Api, client: Client) -> None:
    first = Offer.model_validate(offered(1, prompt="sleep"))
    generation.start(7, first)
    pid = generation.answering()
    deadline = time.monotonic() + 10
    while not pid and time.monotonic() < deadline:
        pid = generation.answering()
    assert pid and psutil.pid_exists(pid) and generation.lock() is None
    with pytest.raises(subprocess.CalledProcessError):
        generation.start(7, first)
    # The child that sleeps is ended from outside; then come those that have queued up behind it.
    api.waiting = [offered(2), offered(3)]
    children: list[psutil.Process] = []
    while not children and time.monotonic() < deadline:
        children = psutil.Process(pid).children()
    children[0].kill()
    deadline = time.monotonic() + 20
    while len(api.answers) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [(answer["generation"], answer["outcome"]) for answer in api.answers] == [(1, "failed"), (2, "succeeded"), (3, "succeeded")]
    while generation.answering() is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert generation.answering() is None, "the right to answer is free again"


def test_a_checkpoint_of_the_storage_is_fetched_while_the_lease_is_kept_and_one_that_is_not_whole_goes_back(
    api: Api, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.workers.test_storage import PLACE, saved
    from workers.storage import Storage

    (tmp_path / "shared").mkdir()
    monkeypatch.setenv("MOELAB_CHECKPOINTS", f"file://{tmp_path}/shared")
    keeps, sha256 = Storage(f"file://{tmp_path}/shared"), saved(tmp_path / "other", 10)
    keeps.put(tmp_path / "other" / "step-00000010", PLACE, lambda: True)
    keeps.put_tokenizer(b"{}", PLACE)
    there = {"run": 9, "step": 10, "sha256": sha256, "place": PLACE, "spec": {"name": "nine"}}
    api.waiting = [offered(1, **there | {"heartbeat_s": 0.01}), offered(2, **there), offered(3, **there | {"sha256": "0" * 64})]
    ran = []
    for _ in range(3):
        offer = generation.take(client, 7)
        assert offer is not None
        generation.answer(client, offer)
        ran.append(offer.run_dir)
    assert [answer["outcome"] for answer in api.answers] == ["succeeded", "succeeded", "not_here"] and api.beats
    assert api.answers[0]["result"]["arguments"][0] == str(ran[0]) and ran[0].is_relative_to(tmp_path / "fetched")
    assert not (tmp_path / "runs" / "9").exists(), "it is not taken for a run of this host's"
    assert not list(ran[0].glob("checkpoints/*")) and (tmp_path / "shared" / PLACE / "MANIFEST.json").exists()
