"""Supervisors of a run on two hosts: node 0 says where the ranks meet and judges, the other one says how its ranks ended."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from spec import events
from tests.workers.conftest import Host
from workers import host
from workers.claim import Claim
from workers.launch import launch
from workers.meeting import Meeting, NoMeeting, interface_of, own_address
from workers.supervisor import Supervisor


@pytest.fixture(autouse=True)
def _several_hosts(worker_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_ADDRESS", "127.0.0.1")
    worker_host.server.hosts = {"rendezvous": "", "lost": None}


def begin(worker_host: Host, node: int, **fields: Any) -> None:
    launch(worker_host.claim(**fields) | {"node": node, "nodes": 2}, worker_host.home / "runs")


def ranks(worker_host: Host) -> host.Holder:
    return worker_host.wait(lambda: (found := host.read(worker_host.attempt_dir() / "attempt.lock")) and found.ranks and found)


def waits_for_ranks(worker_host: Host) -> None:
    """Until ranks 2 and 3 have their handlers of signals."""
    worker_host.wait(lambda: {b"[2] waits", b"[3] waits"} <= set(worker_host.server.log.get(1, b"").splitlines()))


def lost(worker_host: Host) -> None:
    server = worker_host.server
    server.hosts = {"rendezvous": "127.0.0.1:1", "lost": {"reason": "worker_lost", "detail": "node 1 on two was not heard from"}}
    server.command()


def test_node_0_opens_a_port_and_hands_it_to_its_first_rank(worker_host: Host) -> None:
    begin(worker_host, 0, steps=5000, ranks=2)
    holder = ranks(worker_host)
    (said,) = worker_host.wait(lambda: worker_host.server.told)
    assert said["type"] == "rendezvous"
    first, second = (psutil.Process(pid).environ() for pid, _ in holder.ranks)
    assert [(env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) for env in (first, second)] == [
        ("0", "0", "4", "2"),
        ("1", "1", "4", "2"),
    ]
    assert first["MOELAB_RENDEZVOUS"] == second["MOELAB_RENDEZVOUS"] == f"tcp://{said['at']}"
    assert first["GLOO_SOCKET_IFNAME"] == first["NCCL_SOCKET_IFNAME"] == "lo"
    port = int(said["at"].rpartition(":")[2])
    listening = {(c.laddr.ip, c.laddr.port) for c in psutil.Process(holder.ranks[0][0]).net_connections() if c.status == "LISTEN"}
    assert listening == {("127.0.0.1", port)}, "at that address alone"
    assert not psutil.Process(holder.ranks[1][0]).net_connections() and not [
        c for c in psutil.Process(holder.supervisor[0]).net_connections() if c.status == "LISTEN"
    ], "and nobody else holds the port"
    worker_host.server.command("cancel")
    assert worker_host.wait(worker_host.server.ended).outcome == "cancelled"


def test_the_other_node_waits_for_the_place_and_its_ranks_follow_node_0s(worker_host: Host) -> None:
    begin(worker_host, 1, steps=5000, ranks=2)
    worker_host.wait(lambda: worker_host.server.connections)
    assert not host.read(worker_host.attempt_dir() / "attempt.lock").ranks  # type: ignore[union-attr]
    worker_host.server.hosts = {"rendezvous": "10.9.8.7:4711", "lost": None}
    worker_host.server.command()
    envs = [psutil.Process(pid).environ() for pid, _ in ranks(worker_host).ranks]
    assert [(env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) for env in envs] == [("2", "0", "4"), ("3", "1", "4")]
    assert envs[0]["MOELAB_RENDEZVOUS"] == "tcp://10.9.8.7:4711" and "MOELAB_RENDEZVOUS_FD" not in envs[0]
    worker_host.server.command("pause")
    worker_host.wait_until_quiet()
    (left,) = worker_host.server.told
    assert (left["type"], left["outcome"], left["reason"]) == ("left", "paused", "paused")
    assert not worker_host.server.events()


@pytest.mark.parametrize("how", ["cancelled", "fenced"])
def test_a_node_that_never_heard_of_a_place_ends_when_the_attempt_does(worker_host: Host, how: str) -> None:
    begin(worker_host, 1)
    worker_host.wait(lambda: worker_host.server.connections)
    if how == "fenced":
        worker_host.server.fence()
    else:
        worker_host.server.command("cancel")
    worker_host.wait_until_quiet(6)
    assert [left["outcome"] for left in worker_host.server.told] == ["stopped" if how == "fenced" else "cancelled"]


def test_a_killed_rank_of_the_other_node_is_told_with_its_global_number(worker_host: Host) -> None:
    worker_host.server.hosts = {"rendezvous": "127.0.0.1:1", "lost": None}
    begin(worker_host, 1, steps=5000, ranks=2)
    os.kill(ranks(worker_host).ranks[1][0], signal.SIGKILL)
    worker_host.wait_until_quiet()
    (left,) = worker_host.server.told
    assert (left["outcome"], left["reason"], left["detail"]) == ("failed", "rank_killed", "rank 3 was ended by SIGKILL")


def test_a_node_whose_rank_torch_aborted_for_a_lost_peer_says_so(worker_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "Rank 3: watchdog thread terminated with exception: NCCL error: remote process exited or there was a network error"
    monkeypatch.setenv("FAKE_LAST_WORDS", words)
    worker_host.server.hosts = {"rendezvous": "127.0.0.1:1", "lost": None}
    begin(worker_host, 1, steps=5000)
    ranks(worker_host)
    (worker_host.attempt_dir() / "result.json").write_text('{"reason": "peer_lost"}')
    worker_host.wait_until_quiet()
    (left,) = worker_host.server.told
    assert (left["outcome"], left["reason"]) == ("failed", "peer_lost")


def test_node_0_ends_the_attempt_for_the_reason_of_a_lost_host(worker_host: Host) -> None:
    begin(worker_host, 0, steps=5000)
    worker_host.wait(worker_host.server.steps)
    lost(worker_host)
    ended = worker_host.wait(worker_host.server.ended)
    assert (ended.outcome, ended.reason, ended.detail) == ("failed", "worker_lost", "node 1 on two was not heard from")
    worker_host.wait_until_quiet()
    assert worker_host.server.steps() == list(range(1, len(worker_host.server.steps()) + 1))


def test_node_0_whose_ranks_lost_a_peer_waits_to_hear_why(worker_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_EXIT_AT", "3:77")
    begin(worker_host, 0, steps=100)
    lock = worker_host.attempt_dir() / "attempt.lock"
    worker_host.wait(lambda: len(worker_host.server.steps()) == 3 and (found := host.read(lock)) and not found.devices)
    assert worker_host.server.ended() is None
    lost(worker_host)
    ended = worker_host.wait(worker_host.server.ended)
    assert (ended.outcome, ended.reason) == ("failed", "worker_lost")


def test_a_reason_of_node_0s_own_is_not_replaced(worker_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_EXIT_AT", "3:76")
    begin(worker_host, 0, steps=100)
    ended = worker_host.wait(worker_host.server.ended)
    assert isinstance(ended, events.RunEnded) and (ended.outcome, ended.reason) == ("failed", "nan_loss")


@pytest.mark.parametrize("known", [False, True])
def test_an_older_server_is_not_told_of_a_hang_and_one_that_was_not_heard_lately_confirms_nothing(tmp_path: Path, known: bool) -> None:
    claim = Claim(run=1, attempt=1, token="t", spec={}, devices=["cpu:0"], nodes=2, ingest_url="/")  # noqa: S106
    lock = host.AttemptLock(tmp_path / "attempts" / "1")
    supervisor = Supervisor(claim, tmp_path, lock)
    hello = {"type": "command", "desired": "run", "checkpoint_requests": 0, "hosts": {"rendezvous": "", "lost": None}}
    supervisor._shipper._hear(hello | {"hosts": hello["hosts"] | ({"hanging": False} if known else {})})  # type: ignore[operator]
    supervisor._progress.started = True
    supervisor._notice_trouble(time.monotonic() + 1000)
    assert ("hanging" in supervisor._shipper._said) is known and supervisor._hang.startswith("no sign of progress")
    supervisor._shipper.connected = True
    assert supervisor._is_current()
    supervisor._shipper._heard -= 6
    assert not supervisor._is_current(), "the socket is open, but another attempt may have begun"
    os.close(lock.fd)


def test_node_0_tells_the_others_of_a_hang_and_has_the_stacks_of_its_own_ranks(worker_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    worker_host.server.hosts = {"rendezvous": "", "lost": None, "hanging": False}
    monkeypatch.setenv("FAKE_HANG_AT", "3")
    monkeypatch.setenv("MOELAB_STEP_TIMEOUT_S", "1")
    begin(worker_host, 0, steps=100, ranks=2)
    worker_host.wait(lambda: {"type": "hanging"} in worker_host.server.told)
    lock = worker_host.attempt_dir() / "attempt.lock"
    assert host.read(lock).ranks, "they live until the others have heard of it"  # type: ignore[union-attr]
    ended = worker_host.wait(worker_host.server.ended)
    assert ended.reason == "hang"
    assert ended.detail.endswith("s; the stacks of each host's ranks are in the log, and kept with that host")
    assert ended.log_tail.count("Current thread") == 2


def test_another_node_says_where_its_ranks_stand_when_it_hears_of_a_hang(worker_host: Host) -> None:
    worker_host.server.hosts = {"rendezvous": "127.0.0.1:1", "lost": None}
    begin(worker_host, 1, steps=5000, ranks=2)
    ranks(worker_host)
    waits_for_ranks(worker_host)
    worker_host.server.hosts |= {"hanging": True}
    worker_host.server.command()
    worker_host.wait_until_quiet()
    (left,) = worker_host.server.told
    assert (left["outcome"], left["reason"], left["signal"]) == ("failed", "hang", signal.SIGKILL)
    assert "[2] Current thread" in left["log_tail"] and "[3] Current thread" in left["log_tail"]
    assert left["log_tail"].rstrip() in worker_host.server.log[1].decode()


def test_a_node_that_is_fenced_says_how_its_ranks_ended(worker_host: Host) -> None:
    worker_host.server.hosts = {"rendezvous": "127.0.0.1:1", "lost": None}
    begin(worker_host, 1, steps=5000, ranks=2)
    pids = [pid for pid, _ in ranks(worker_host).ranks]
    waits_for_ranks(worker_host)
    os.kill(pids[1], signal.SIGKILL)
    worker_host.server.fence()
    worker_host.wait_until_quiet()
    (left,) = worker_host.server.told
    assert (left["outcome"], left["reason"], left["detail"]) == ("failed", "rank_killed", "rank 3 was ended by SIGKILL")
    assert left["signal"] == signal.SIGKILL and left["exit_code"] is None
    assert left["log_tail"] and left["log_tail"].rstrip() in worker_host.server.log[1].decode()


def test_the_address_is_given_or_the_one_by_which_the_server_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_address() == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo" and interface_of("203.0.113.9") is None
    monkeypatch.delenv("MOELAB_ADDRESS")
    monkeypatch.setenv("MOELAB_SERVER", "http://127.0.0.1:8000")
    beyond = own_address()
    assert interface_of(beyond) is not None, "an address of this host, and one that others can reach where there is any"
    monkeypatch.setenv("MOELAB_ADDRESS", "127.0.0.3")
    meeting = Meeting.called(2)
    assert meeting.place.startswith("127.0.0.3:") and meeting.fds
    meeting.close()


@pytest.mark.parametrize(
    ("name", "value"), [("MOELAB_ADDRESS", "192.0.2.7"), ("MOELAB_RENDEZVOUS_PORT", "many"), ("MOELAB_RENDEZVOUS_PORT", "70000")]
)
def test_a_host_that_cannot_be_met_says_what_it_was_told(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("MOELAB_ADDRESS", "127.0.0.1")
    monkeypatch.setenv(name, value)
    with pytest.raises(NoMeeting, match=rf"{name} '{value}'"):
        Meeting.called(2)


def test_an_address_that_is_good_on_one_link_alone_is_not_given_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_ADDRESS", "fe80::1%lo")
    with pytest.raises(NoMeeting, match=r"MOELAB_ADDRESS 'fe80::1%lo'.*: fe80::1\S* is good on one link, .* others cannot use it"):
        Meeting.called(2)
    assert interface_of("127.0.0.1%lo") == "lo", "but a host knows its own link"
