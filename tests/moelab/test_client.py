"""The client's manners, against a small HTTP server that answers as it is told."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelab.client import ApiError, Client, ServerUnreachable
from moelab.connection import find_server
from moelab.redis_url import celery_broker
from moelab.sse import Message, messages
from spec import block


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `answers`: (status, headers, body); "drop" closes the connection."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Any] = []
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path, dict(self.headers), body))
        answer = self.server.answers.pop(0)
        if answer == "drop":
            self.connection.shutdown(2)
            return
        status, headers, content = answer
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = do_PATCH = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url + "/", "mlk_secret") as made:
        yield made


def test_a_problem_becomes_an_exception_with_its_fields(client: Client, server: Server) -> None:
    errors = [{"pointer": "/spec/model/moe/top_k", "detail": "top_k 9 > n_experts 8"}]
    server.answers = [(422, {"Content-Type": "application/problem+json"}, {"title": "Invalid", "detail": "one problem", "errors": errors})]
    with pytest.raises(ApiError) as refused:
        client.submit(preset="nano-mixtral")
    assert (refused.value.status, refused.value.title, refused.value.errors) == (422, "Invalid", errors)
    assert "/spec/model/moe/top_k: top_k 9 > n_experts 8" in str(refused.value)
    server.answers = [(502, {}, b"<html>")]
    with pytest.raises(ApiError, match="502"):
        client.me()


def test_a_submit_whose_answer_was_lost_is_sent_again_with_the_same_key(client: Client, server: Server) -> None:
    server.answers = ["drop", (503, {}, {}), (201, {}, {"id": 5})]
    assert client.submit({"name": "x"}, overrides={"seed": 1})["id"] == 5
    keys = {headers["Idempotency-Key"] for _, _, headers, _ in server.asked}
    assert len(server.asked) == 3 and len(keys) == 1
    assert {headers["Authorization"] for _, _, headers, _ in server.asked} == {"Bearer mlk_secret"}
    assert json.loads(server.asked[0][3]) == {"spec": {"name": "x"}, "overrides": {"seed": 1}}


def test_what_is_not_safe_to_repeat_is_sent_once(client: Client, server: Server) -> None:
    server.answers = ["drop"]
    with pytest.raises(ServerUnreachable):
        client.claim(worker=1, free_slots=1, free_devices=["cpu:0"])
    assert len(server.asked) == 1
    server.answers = [(204, {}, b"")]
    assert client.claim(worker=1, free_slots=1, free_devices=[]) is None


def test_lists_are_read_page_by_page_and_no_further_than_asked(client: Client, server: Server) -> None:
    page = (200, {}, {"items": [{"id": 1}, {"id": 2}], "next_cursor": "c2"})
    server.answers = [page, (200, {}, {"items": [{"id": 3}], "next_cursor": None})]
    assert [run["id"] for run in client.runs(state="running", archived=True, tag=None)] == [1, 2, 3]
    assert server.asked[0][1] == "/api/v1/runs?state=running&archived=true"
    assert server.asked[1][1].endswith("cursor=c2")
    server.answers = [page]
    assert [run["id"] for run in client.runs(limit=2)] == [1, 2]


def test_wait_bears_a_server_that_restarts(client: Client, server: Server) -> None:
    run = {"id": 1, "state": "running"}
    server.answers = [(200, {}, run), *["drop"] * 4, (503, {}, {}), (200, {}, run | {"state": "succeeded"})]
    assert client.wait(1)["state"] == "succeeded"
    server.answers = [(200, {}, run)] * 9
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        client.wait(1, timeout_s=0.5)
    assert time.monotonic() - began < 2
    server.answers = [(404, {}, {})]
    with pytest.raises(ApiError):
        client.wait(1)


def test_a_followed_log_goes_on_where_it_was_cut(client: Client, server: Server) -> None:
    def event(at: int, text: str) -> bytes:
        return f"id: {at + len(text)}\ndata: {json.dumps({'offset': at, 'text': text})}\n\n".encode()

    cut = event(0, "one\n") + b"id: 99\ndata: {half a mess"
    rest = b": still here\n\n" + event(4, "two\n") + b"id: 8\nevent: end\ndata: {}\n\n"
    server.answers = [(200, {}, cut), (200, {}, rest)]
    assert "".join(client.follow_logs(1)) == "one\ntwo\n"
    assert server.asked[1][2]["Last-Event-ID"] == "4"


def test_steps_are_numpy_arrays(client: Client, server: Server) -> None:
    header = {"type": "steps", "level": 1, "names": ["loss", "lr"]}
    scalars = np.array([[2.0, 0.1], [1.0, 0.2]], np.float32)
    server.answers = [(200, {}, block.encode(header, {"step": np.array([1, 2], np.uint32), "scalars": scalars}))]
    found = client.steps(3, from_step=1, to_step=2, tensors=["expert_tokens"])
    assert server.asked[0][1] == "/api/v1/runs/3/steps?scalars=%2A&tensors=expert_tokens&from=1&to=2"
    assert found.scalar("lr").tolist() == pytest.approx([0.1, 0.2])
    with pytest.raises(KeyError, match="loss, lr"):
        found.scalar("los")


def test_an_export_is_written_whole_or_not_at_all(client: Client, server: Server, tmp_path: Path) -> None:
    server.answers = [(200, {}, b"a,b\n1,2\n")]
    assert client.export(1, "metrics.csv", tmp_path / "m.csv").read_text() == "a,b\n1,2\n"
    server.answers = [(200, {"Content-Length": "100"}, b"half")]
    with pytest.raises(ServerUnreachable):
        client.export(1, "metrics.csv", tmp_path / "other.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


def test_a_spec_or_a_preset_not_both(client: Client) -> None:
    with pytest.raises(ValueError, match="either"):
        client.submit()
    with pytest.raises(ValueError, match="either"):
        client.price({"name": "x"}, preset="y")


def test_which_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOELAB_SERVER", "MOELAB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    assert find_server() == ("http://127.0.0.1:8000", "")
    (tmp_path / "client.json").write_text('{"server": "http://127.0.0.1:8123", "token": "mlk_local"}')
    assert find_server() == ("http://127.0.0.1:8123", "mlk_local")
    assert find_server("http://127.0.0.1:8123/") == ("http://127.0.0.1:8123", "mlk_local")
    assert find_server("https://elsewhere.example") == ("https://elsewhere.example", ""), "the local token goes to nobody else"
    monkeypatch.setenv("MOELAB_SERVER", "https://lab.example")
    monkeypatch.setenv("MOELAB_TOKEN", "mlk_env")
    assert find_server() == ("https://lab.example", "mlk_env")
    assert find_server(token="mlk_given") == ("https://lab.example", "mlk_given")
    (tmp_path / "client.json").write_text("torn")
    monkeypatch.delenv("MOELAB_SERVER")
    assert find_server().server == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("url", "broker"),
    [
        ("unix:///run/valkey.sock?db=2", "redis+socket:///run/valkey.sock?virtual_host=2"),
        ("unix:///run/valkey.sock", "redis+socket:///run/valkey.sock?virtual_host=0"),
        ("unix://:p%40ss@/run/v.sock?db=1", "redis+socket:///run/v.sock?virtual_host=1&password=p%40ss"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("rediss://:secret@host/1", "rediss://:secret@host/1"),
    ],
)
def test_one_redis_url_for_all(url: str, broker: str) -> None:
    assert celery_broker(url) == broker


def test_another_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="amqp"):
        celery_broker("amqp://host")


def test_server_sent_events() -> None:
    lines = ["id: 4", "data: a", "data:b", "", ": comment", "", "event: end", "data: {}", "", "data: unfinished"]
    assert list(messages(lines)) == [Message("message", "4", "a\nb"), Message("end", "", "{}")]


def test_importing_moelab_costs_nothing() -> None:
    code = (
        "import sys, moelab; print(sorted({'django', 'celery', 'numpy', 'httpx'} & set(sys.modules))); moelab.Client; print('django' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["[]", "False"], done.stderr
