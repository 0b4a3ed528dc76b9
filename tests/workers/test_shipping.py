"""Nothing is lost, doubled or reordered on the way to the server, whatever the network does."""

from __future__ import annotations

import time

import pytest

from spec import spool
from tests.workers.conftest import Host


def shipped_equals_spool(worker_host: Host, attempt: int = 1) -> bool:
    with spool.Reader(worker_host.attempt_dir(attempt=attempt) / "events.spool") as reader:
        kept = [payload for _, payload in reader.read(max_records=100_000)]
    return bool(kept) and worker_host.server.records[attempt] == kept


def test_training_goes_on_while_the_server_is_away(worker_host: Host) -> None:
    server = worker_host.server
    worker_host.launch(steps=120)
    worker_host.wait(lambda: len(server.steps()) > 5)
    server.stop()
    known = len(server.steps())
    size = (worker_host.attempt_dir() / "events.spool").stat().st_size
    time.sleep(1.0)
    assert len(server.steps()) == known
    assert (worker_host.attempt_dir() / "events.spool").stat().st_size > size
    server.start()
    worker_host.wait_until_quiet(30)
    assert server.steps() == list(range(1, 121))
    assert shipped_equals_spool(worker_host)


def test_a_server_that_comes_back_after_the_end_still_gets_everything(worker_host: Host) -> None:
    server = worker_host.server
    worker_host.launch(steps=20)
    worker_host.wait(server.steps)
    server.stop()
    worker_host.wait(lambda: not worker_host.running("tests.workers.fake_trainer"))
    assert worker_host.processes(), "the supervisor waits for the server"
    server.start()
    worker_host.wait_until_quiet(30)
    assert server.ended() is not None
    assert shipped_equals_spool(worker_host)
    assert server.log[1] == (worker_host.attempt_dir() / "log.txt").read_bytes()


def test_a_connection_that_breaks_after_every_third_frame(worker_host: Host) -> None:
    server = worker_host.server
    server.cut_after_frames = 3
    worker_host.launch(steps=150)
    worker_host.wait_until_quiet(60)
    assert server.connections >= 3
    assert shipped_equals_spool(worker_host)


def test_acknowledgements_that_are_lost_or_come_twice(worker_host: Host) -> None:
    server = worker_host.server
    server.ack_twice, server.drop_acks = True, 3
    worker_host.launch(steps=60)
    worker_host.wait_until_quiet(30)
    assert server.drop_acks == 0
    assert shipped_equals_spool(worker_host)


def test_a_server_that_has_forgotten_gets_it_again(worker_host: Host) -> None:
    server = worker_host.server
    worker_host.launch(steps=60)
    worker_host.wait(lambda: len(server.steps()) > 20)
    server.stop()
    server.records[1] = server.records[1][:4]
    server.start()
    worker_host.wait_until_quiet(30)
    assert shipped_equals_spool(worker_host)


def test_what_an_older_attempt_left_is_shipped_first(worker_host: Host) -> None:
    server = worker_host.server
    server.stop()
    holder = worker_host.launch(steps=5000)
    worker_host.wait(lambda: (worker_host.attempt_dir() / "events.spool").exists())
    time.sleep(0.3)
    for process in worker_host.processes():
        if process.pid == holder.supervisor[0]:
            process.kill()
    worker_host.wait_until_quiet(2)
    server.start()
    worker_host.launch(steps=20, attempt=2)
    worker_host.wait_until_quiet()
    assert list(server.records) == [1, 2], "the older attempt came first"
    assert shipped_equals_spool(worker_host, 1)
    assert shipped_equals_spool(worker_host, 2)


def test_a_server_that_is_slow_gets_larger_frames(worker_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "0.005")
    server = worker_host.server
    server.ack_after_s = 0.2
    began = time.monotonic()
    worker_host.launch(steps=300)
    worker_host.wait_until_quiet(30)
    assert shipped_equals_spool(worker_host)
    assert server.frames < 10 * (time.monotonic() - began) + 5, "a frame for each step would take 60 s"


def test_heartbeats_come_every_three_seconds(worker_host: Host) -> None:
    worker_host.launch(steps=5000)
    worker_host.wait(worker_host.server.steps)
    before = worker_host.server.heartbeats
    time.sleep(3.5)
    assert worker_host.server.heartbeats - before in (1, 2)
